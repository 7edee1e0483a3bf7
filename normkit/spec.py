# SPDX-License-Identifier: Apache-2.0
"""What is computed: NormSpec (the mathematics) and Problem (one call of it, as plain data, with all validation)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import NamedTuple

from .arrays import FLOAT_DTYPES
from .errors import DeviceError, DtypeError, OptionError, ShapeError

KINDS = ("rms", "layer")
ROUNDINGS = ("sum", "stored", "hf")


@dataclass(frozen=True)
class NormSpec:
    r"""The mathematics of one residual norm.

    $$h = x + \text{residual}, \qquad
      y = \frac{h - \text{mean}}{\sqrt{\operatorname{mean}((h - \text{mean})^2) + \text{eps}}}
          (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with mean = 0 for RMSNorm (Zhang and Sennrich, arXiv:1910.07467) and the mean of the row for LayerNorm
    (Ba, Kiros and Hinton, arXiv:1607.06450).

    Args:
        kind: "rms" or "layer".
        eps: added to the mean square, inside the root; not negative.
        weight_offset: added to the weight in the compute dtype; 1.0 for Gemma.
        rounding: None (any policy within the documented bound), "sum", "stored" or "hf"; see docs/numerics.md.

    Example:
        >>> NormSpec("rms", eps=1e-6, rounding="hf").subtract_mean
        False
    """

    kind: str
    eps: float = 1e-6
    weight_offset: float = 0.0
    rounding: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        for name in ("eps", "weight_offset"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise OptionError(f"{name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.eps < 0:
            raise OptionError(f"eps is added to a mean square inside a root and must be at least 0, got {self.eps!r}")
        if self.rounding not in (None, *ROUNDINGS):
            raise OptionError(f"rounding={self.rounding!r} is not one of None, {', '.join(map(repr, ROUNDINGS))}")

    @property
    def subtract_mean(self) -> bool:
        """Whether the row's mean is taken off: True for LayerNorm."""
        return self.kind == "layer"


class Operand(NamedTuple):
    """Shape, dtype name and device (anything that compares and prints) of one array of a call."""

    shape: tuple[int, ...]
    dtype: str
    device: object = "cpu"


@dataclass(frozen=True)
class Problem:
    """One call of a NormSpec, as plain data: all that choosing and planning may depend on. Made by `describe`.

    Attributes:
        spec: the mathematics.
        shape: shape of x, and of residual, y and residual_out; the last dimension is normalised.
        x_dtype: dtype of x.
        residual_dtype: dtype of the residual given, None if there is none.
        weight_dtype: dtype of the weight, None if there is none.
        bias_dtype: dtype of the bias, None if there is none.
        out_dtype: dtype of y.
        residual_out_dtype: dtype of the residual_out to compute, None if none is asked for or x itself serves.
        platform: "cuda", "rocm", "xpu", "cpu" or another that a framework reports.
        arch: "sm_90", "gfx942", ...; None where it plays no part.
        layout: "contiguous"; "rows" (x and residual have unit stride along the row, any stride between rows); "strided".
        needs_grad: whether a backward may follow, so that mean and rstd are wanted.
        in_place: whether y overwrites x, and residual_out the residual.
        portable: whether this is part of a program for other processes or several platforms, as `jax.export` makes it.
        spread: whether this is part of a program that spreads its arrays over several devices in a way which is not known.
    """

    spec: NormSpec
    shape: tuple[int, ...]
    x_dtype: str
    residual_dtype: str | None
    weight_dtype: str | None
    bias_dtype: str | None
    out_dtype: str
    residual_out_dtype: str | None
    platform: str = "cpu"
    arch: str | None = None
    layout: str = "contiguous"
    needs_grad: bool = False
    in_place: bool = False
    portable: bool = False
    spread: bool = False

    @property
    def hidden_size(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @cached_property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the arrays given."""
        given = (self.x_dtype, self.residual_dtype, self.weight_dtype, self.bias_dtype)
        return tuple(dtype for dtype in given if dtype is not None)

    @cached_property
    def compute_dtype(self) -> str:
        """Dtype of all arithmetic and of the statistics: float64 as soon as an array is float64, else float32."""
        return "float64" if "float64" in self.dtypes else "float32"

    @property
    def h_dtype(self) -> str:
        """Dtype of the h that is kept for the backward pass: of residual_out, or of x where that is the same."""
        return self.residual_out_dtype or self.x_dtype


def _check_operands(x: Operand, others: dict[str, Operand], floats: dict[str, str]) -> None:
    if not x.shape or x.shape[-1] < 1:
        raise ShapeError(f"x must have a last dimension of at least 1 to normalise, got shape {tuple(x.shape)}")
    for name, dtype in floats.items():
        if dtype not in FLOAT_DTYPES:
            raise DtypeError(f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {dtype}")
    for name, operand in others.items():
        expected = tuple(x.shape) if name == "residual" else (x.shape[-1],)
        if tuple(operand.shape) != expected:
            because = "the shape of x" if name == "residual" else "one value for each element of the last dimension of x"
            raise ShapeError(
                f"{name} must have shape {expected}, {because}; got {tuple(operand.shape)} with x of shape {tuple(x.shape)}"
            )
        if operand.device != x.device:
            raise DeviceError(f"{name} is on {operand.device} and x on {x.device}: move them to one device")


def describe(
    spec: NormSpec,
    x: Operand,
    residual: Operand | None = None,
    weight: Operand | None = None,
    bias: Operand | None = None,
    *,
    returns_residual: bool = True,
    residual_dtype: str | None = None,
    out_dtype: str | None = None,
    platform: str = "cpu",
    arch: str | None = None,
    layout: str = "contiguous",
    needs_grad: bool = False,
    in_place: bool = False,
) -> Problem:
    """Validate the arrays and options of one call and return it as a Problem.

    Args:
        spec: the mathematics.
        x: the array to normalise.
        residual: the residual stream, of x's shape.
        weight: of shape (hidden_size,).
        bias: of shape (hidden_size,).
        returns_residual: whether the caller gets residual_out; False for rms_norm and layer_norm.
        residual_dtype: dtype asked for residual_out; by default residual's, or x's without one.
        out_dtype: dtype asked for y; by default x's.
        platform: where the arrays are.
        arch: the device's architecture.
        layout: see Problem.
        needs_grad: whether a backward may follow.
        in_place: whether y overwrites x, and residual_out the residual.

    Raises:
        ShapeError: the shapes do not belong together.
        DtypeError: an array or option has a dtype that is not a supported float.
        DeviceError: the arrays are on different devices.
        OptionError: options that contradict each other.

    Example:
        >>> x = Operand((2, 3, 64), "bfloat16")
        >>> describe(NormSpec("rms"), x, residual=Operand((2, 3, 64), "float32")).residual_out_dtype
        'float32'
    """
    others = {name: op for name, op in (("residual", residual), ("weight", weight), ("bias", bias)) if op is not None}
    floats = {"x": x.dtype, **{name: operand.dtype for name, operand in others.items()}}
    asked = (("residual_dtype", residual_dtype), ("out_dtype", out_dtype))
    _check_operands(x, others, floats | {name: dtype for name, dtype in asked if dtype is not None})
    if residual_dtype is not None and not returns_residual:
        raise OptionError(
            f"residual_dtype={residual_dtype!r} sets the dtype of residual_out, which only the add_ functions return"
        )
    if weight is None and spec.weight_offset:
        raise OptionError(f"weight_offset={spec.weight_offset!r} is added to a weight, and none was given")
    residual_out = residual_dtype or (residual.dtype if residual is not None else x.dtype)
    if in_place:
        name = f"add_{spec.kind}_norm"
        if residual is None:
            raise OptionError(
                f"{name}_ needs a residual, whose memory residual_out takes, and got None: give one, or use {name}"
            )
        if (out_dtype or x.dtype, residual_out) != (x.dtype, residual.dtype):
            raise OptionError(
                "in place, y takes the memory of x and residual_out that of the residual: ask for no other dtypes"
            )
    return Problem(
        spec=spec,
        shape=tuple(x.shape),
        x_dtype=x.dtype,
        residual_dtype=residual.dtype if residual is not None else None,
        weight_dtype=weight.dtype if weight is not None else None,
        bias_dtype=bias.dtype if bias is not None else None,
        out_dtype=out_dtype or x.dtype,
        residual_out_dtype=None if residual is None and residual_out == x.dtype else residual_out,
        platform=platform,
        arch=arch,
        layout=layout,
        needs_grad=needs_grad,
        in_place=in_place,
    )
