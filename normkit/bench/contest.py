# SPDX-License-Identifier: Apache-2.0
"""What contestants compete in: a case in one dtype, one kind of norm and one pass, with its arrays; and what they bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..arrays import numpy_dtype
from ..errors import OptionError
from ..spec import NormSpec, Operand, Problem, describe
from .traffic import moved_bytes

PASSES = ("forward", "in-place", "backward", "forward-and-backward")
"""forward: y and residual_out in memory of their own. in-place: residual_out in the residual's memory. backward: all gradients,
from a forward that is not timed. forward-and-backward: both, as one compiled JAX program computes them."""

DTYPES = ("float32", "bfloat16", "float16")

CLOCKS = ("device", "graph", "host")
"""device: what a call takes the device, its own events around it. graph: the same of a call within a CUDA graph of many. host:
what a call takes the processor, which on a GPU is to launch it, and on the processor all there is."""

_EPS = {"rms": 1e-6, "layer": 1e-5}


class Case(NamedTuple):
    """How many rows, and how long they are."""

    rows: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.hidden_size}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Return the case of a text such as "16x4096".

        Raises:
            OptionError: the text is of another form.

        Example:
            >>> Case.parse("16x4096").hidden_size
            4096
        """
        rows, _, hidden_size = text.partition("x")
        if not (rows.isdecimal() and hidden_size.isdecimal() and int(rows) and int(hidden_size)):
            raise OptionError(f"a case is rows x hidden_size, such as 16x4096, both at least 1; got {text!r}")
        return cls(int(rows), int(hidden_size))


class Arrays(NamedTuple):
    """The arrays of a contest, of NumPy or of a framework; bias is None for RMSNorm."""

    x: Any
    residual: Any
    weight: Any
    bias: Any
    dy: Any
    dresidual_out: Any

    def map(self, function: Callable[[Any], Any]) -> Arrays:
        """Return what the function makes of each array that there is."""
        return Arrays(*(None if array is None else function(array) for array in self))


@dataclass(frozen=True)
class Contest:
    """One workload: `kind` is that of NormSpec, `pass_` one of PASSES, `clock` one of CLOCKS."""

    case: Case
    dtype: str
    kind: str
    pass_: str
    clock: str = "host"

    def __str__(self) -> str:
        return f"{self.case} {self.dtype} {self.kind} {self.pass_}{'' if self.clock == 'host' else f' {self.clock}'}"

    @property
    def eps(self) -> float:
        """What all contestants add inside the root."""
        return _EPS[self.kind]

    @property
    def problem(self) -> Problem:
        """The call that normkit's functions get."""
        rows, hidden = Operand(tuple(self.case), self.dtype), Operand((self.case.hidden_size,), self.dtype)
        return describe(NormSpec(self.kind, self.eps), rows, rows, hidden, hidden if self.kind == "layer" else None)

    @property
    def moved_bytes(self) -> int:
        """The bytes that every contestant has to move; see `normkit.bench.traffic`."""
        return moved_bytes(self.problem, self.pass_)

    def of_rows(self, rows: int) -> Contest:
        """Return the contest with another number of rows."""
        return replace(self, case=self.case._replace(rows=rows))

    def arrays(self, seed: int) -> Arrays:
        """Return normally distributed arrays of NumPy, the same ones for the same seed."""
        rng = np.random.default_rng([seed, *self.case])

        def normal(shape: tuple[int, ...], mean: float = 0.0, scale: float = 1.0) -> Any:
            return (mean + scale * rng.standard_normal(shape, np.float32)).astype(numpy_dtype(self.dtype))

        return self.filled(normal)

    def filled(self, normal: Callable[..., Any]) -> Arrays:
        """Return arrays by a function of shape, mean (0 unless given) and standard deviation (1 unless given)."""
        shape, hidden = tuple(self.case), (self.case.hidden_size,)
        bias = normal(hidden, 0.0, 0.5) if self.kind == "layer" else None
        return Arrays(normal(shape), normal(shape), normal(hidden, 1.0, 0.3), bias, normal(shape), normal(shape))


def _nothing(*arguments: Any) -> None:
    pass


def _unnamed(*arguments: Any) -> str:
    return ""


class Program(NamedTuple):
    """How one contestant computes one contest.

    Attributes:
        put: the device's arrays as the buffers that the program works on; programs with the same function share buffers.
        ready: a call on buffers, ready to be made once: only the call itself is timed.
        results: the results by name, from the buffers and what the call returned; None if there are none.
        reset: gives the buffers the values of the arrays again, where the call overwrites them.
        implementation: the name of the implementation that normkit chooses for the buffers.
    """

    put: Callable[[Arrays], Any]
    ready: Callable[[Any], Callable[[], Any]]
    results: Callable[[Any, Any], dict[str, Any]] | None
    reset: Callable[[Any, Arrays], None] = _nothing
    implementation: Callable[[Any], str] = _unnamed
