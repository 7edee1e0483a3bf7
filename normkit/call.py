# SPDX-License-Identifier: Apache-2.0
"""One call of a public function, as every front end handles it: from arguments to Problem, from Forward to result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .arrays import FLOAT_DTYPES, Array, dtype_name
from .errors import DeviceError, DtypeError, OptionError, ShapeError
from .interface import Forward
from .spec import NormSpec, Operand, Problem, describe

FUNCTIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "add_rms_norm_", "add_layer_norm_")

Arrays = tuple[Any, Any, Any, Any, Any, Any]
"""x, residual, weight, bias, out and residual_out of a call, None for one that there is not."""

Options = tuple[Any, Any, Any, Any, Any, Any]
"""eps, weight_offset, rounding, residual_dtype, out_dtype and implementation."""


# no NamedTuple, which torch 2.8 cannot trace; nobody changes one, but frozen it would take longer to make
@dataclass(slots=True, unsafe_hash=True)
class Call:
    """The arguments of one call; `function` is one of FUNCTIONS, the others are documented at `normkit.add_rms_norm`."""

    function: str
    x: Array
    residual: Array | None
    weight: Array | None
    bias: Array | None
    eps: float
    weight_offset: float
    rounding: str | None
    residual_dtype: object
    out_dtype: object
    implementation: str | None
    out: Array | None = None
    residual_out: Array | None = None

    @classmethod
    def of(cls, function: str, arrays: Arrays, options: Options) -> Call:
        """Return the call of x, residual, weight, bias, out and residual_out with eps and the options that follow it."""
        return cls(function, *arrays[:4], *options, *arrays[4:])

    def parts(self) -> tuple[str, Arrays, Options]:
        """Return what `of` takes."""
        return (
            self.function,
            (self.x, self.residual, self.weight, self.bias, self.out, self.residual_out),
            (self.eps, self.weight_offset, self.rounding, self.residual_dtype, self.out_dtype, self.implementation),
        )

    @property
    def kind(self) -> str:
        """The kind of norm, as NormSpec has it."""
        return "rms" if "rms" in self.function else "layer"

    @property
    def returns_residual(self) -> bool:
        """Whether the function hands on the residual stream."""
        return self.function.startswith("add_")

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays given, by name; x is always there."""
        names = ("x", "residual", "weight", "bias")
        return {name: getattr(self, name) for name in names if name == "x" or getattr(self, name) is not None}

    @property
    def outputs(self) -> dict[str, Array]:
        """The arrays given to write to, by name."""
        return {name: getattr(self, name) for name in ("out", "residual_out") if getattr(self, name) is not None}

    @property
    def writes(self) -> bool:
        """Whether anything that is given is written to."""
        return self.out is not None or self.residual_out is not None or self.function.endswith("_")

    def with_arrays(self, function: Callable[[str, Array], Array]) -> Call:
        """Return the call with function(name, array) in place of each array given."""
        arrays: dict[str, Any] = {name: function(name, array) for name, array in self.arrays.items()}
        return replace(self, **arrays)

    def dtypes(self) -> dict[str, str | None]:
        """Return residual_dtype and out_dtype by name."""
        asked = {"residual_dtype": self.residual_dtype, "out_dtype": self.out_dtype}
        return {name: None if dtype is None else dtype_name(dtype, name) for name, dtype in asked.items()}

    def problem(self, operand: Callable[[str, Array], Operand], **facts: Any) -> Problem:
        """Validate the call and describe it.

        Args:
            operand: gives shape, dtype name and device of the array of that name.
            **facts: what the front end knows besides: platform, arch, layout, needs_grad.
        """
        operands: dict[str, Any] = {name: operand(name, array) for name, array in self.arrays.items()}
        dtypes: dict[str, Any] = self.dtypes()
        problem = describe(
            NormSpec(self.kind, self.eps, self.weight_offset, self.rounding),
            **operands,
            **dtypes,
            returns_residual=self.returns_residual,
            in_place=self.function.endswith("_"),
            **facts,
        )
        self.check_outputs(operand)
        return problem

    def check_outputs(self, operand: Callable[[str, Array], Operand]) -> None:
        """Refuse arrays to write to that are not just what would be returned.

        Raises:
            ShapeError: one is not of x's shape.
            DtypeError: one is not of the result's dtype, or not an array.
            DeviceError: one is not on x's device.
            OptionError: they are one array.
        """
        if self.out is None and self.residual_out is None:
            return
        x, asked = operand("x", self.x), self.dtypes()
        stream = x if self.residual is None else operand("residual", self.residual)
        dtypes = {"out": asked["out_dtype"] or x.dtype, "residual_out": asked["residual_dtype"] or stream.dtype}
        for name, array in self.outputs.items():
            _check_output(name, operand(name, array), x, dtypes[name])
        if self.out is self.residual_out:
            raise OptionError("out and residual_out must not share memory, and one array was given for both: give two")

    def room(self, problem: Problem, empty: Callable[[str], Array]) -> Forward:
        """Return the arrays to compute in: those given to write to, and for other results new ones, from empty(dtype)."""
        y = empty(problem.out_dtype) if self.out is None else self.out
        if problem.residual_out_dtype is None:
            return Forward(y, None, None, None)
        return Forward(y, empty(problem.residual_out_dtype) if self.residual_out is None else self.residual_out, None, None)

    def written(self, forward: Forward) -> Forward:
        """Copy what was not computed in the arrays given to write to, and return it with these arrays in it."""
        y, residual_out = forward.y, forward.residual_out
        if self.out is not None and self.out is not y:
            self.out[...] = y
            y = self.out
        if self.residual_out is not None and self.residual_out is not residual_out:
            self.residual_out[...] = self.x if residual_out is None else residual_out
            residual_out = self.residual_out
        return Forward(y, residual_out, forward.mean, forward.rstd)

    def result(self, forward: Forward) -> Any:
        """Return what the function returns: y, or y and residual_out, which is x itself where nothing else was computed."""
        if not self.returns_residual:
            return forward.y
        return forward.y, self.x if forward.residual_out is None else forward.residual_out


def _check_output(name: str, output: Operand, x: Operand, dtype: str) -> None:
    if tuple(output.shape) != tuple(x.shape):
        raise ShapeError(f"{name} must have the shape of x, {tuple(x.shape)}; got {tuple(output.shape)}: it is not resized")
    if output.dtype != dtype:
        result, option = ("y", "out_dtype") if name == "out" else (name, "residual_dtype")
        hint = f", or set {option}={output.dtype!r}" if output.dtype in FLOAT_DTYPES else ""
        raise DtypeError(f"{name} must have the dtype of {result}, {dtype}; got {output.dtype}: give one of {dtype}{hint}")
    if output.device != x.device:
        raise DeviceError(f"{name} is on {output.device} and x on {x.device}: move them to one device")


def bind(functions: Mapping[str, Callable[..., Any]], function: str, *arrays: Array | None, **options: Any) -> Call:
    """Return the Call that `functions[function](*arrays, **options)` makes, defaults filled in; for `explain`.

    Raises:
        OptionError: there is no such function.
        TypeError: it does not take these arguments.
    """
    if function not in FUNCTIONS or function not in functions:
        known = ", ".join(repr(name) for name in FUNCTIONS if name in functions)
        raise OptionError(f"function={function!r} is not one of {known}")
    try:
        bound = inspect.signature(functions[function]).bind(*arrays, **options)
    except TypeError as error:
        raise TypeError(f"{function}() {error}") from None
    bound.apply_defaults()
    return Call(function, *(bound.arguments.get(name) for name in Call.__match_args__[1:]))  # type: ignore[arg-type]
