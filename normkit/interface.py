# SPDX-License-Identifier: Apache-2.0
"""What an implementation is: a module with these functions, over the arrays of its framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .arrays import Array
from .spec import Problem


class Rejected(NamedTuple):
    """An implementation's answer to a problem it cannot compute."""

    reason: str


class Forward(NamedTuple):
    """Result of a forward call.

    Attributes:
        y: the normalised rows, of problem.shape and problem.out_dtype.
        residual_out: of problem.residual_out_dtype; None where that is None.
        mean: one value per row, of shape problem.shape[:-1] and the compute dtype; only for LayerNorm, and where a backward
            may follow: then the mean of h as it is handed on, which is what the backward pass has.
        rstd: the same, for 1 / sqrt(mean((h - mean)^2) + eps).
    """

    y: Array
    residual_out: Array | None
    mean: Array | None
    rstd: Array | None


class Wanted(NamedTuple):
    """Which gradients a backward call is to compute. dresidual is wanted only where its dtype is not that of dx."""

    dx: bool
    dresidual: bool
    dweight: bool
    dbias: bool

    @classmethod
    def by(cls, problem: Problem, x: bool = True, residual: bool = True, weight: bool = True, bias: bool = True) -> Wanted:
        """Return what to compute when these operands ask for a gradient: one dh serves x and a residual of x's dtype."""
        residual = residual and problem.residual_dtype is not None
        same = problem.residual_dtype == problem.x_dtype
        return cls(
            dx=x or (residual and same),
            dresidual=residual and not same,
            dweight=weight and problem.weight_dtype is not None,
            dbias=bias and problem.bias_dtype is not None,
        )


class Gradients(NamedTuple):
    """Result of a backward call, each in the dtype of what it is the gradient of; None where not wanted."""

    dx: Array | None
    dresidual: Array | None
    dweight: Array | None
    dbias: Array | None

    def by_operand(self, problem: Problem) -> tuple[Array | None, Array | None, Array | None, Array | None]:
        """Return the gradients of x, residual, weight and bias; those of x and residual are one array if of one dtype."""
        same = problem.residual_dtype == problem.x_dtype
        return self.dx, self.dx if same else self.dresidual, self.dweight, self.dbias


class Kernels(Protocol):
    """The functions that an implementation's module offers. `forward_` is there only if it can compute in place.

    One that cannot launch its kernels raises LaunchError before it has written anything, and then rejects problems like that.
    """

    def supports(self, problem: Problem) -> Rejected | None:
        """Say why this problem cannot be computed, or None if it can. Imports nothing heavy, touches no device."""

    def forward(self, problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Forward:
        """Compute y, residual_out and the statistics; inputs stay as they are."""

    def backward(
        self,
        problem: Problem,
        wanted: Wanted,
        dy: Array,
        dresidual_out: Array | None,
        h: Array,
        weight: Array | None,
        mean: Array | None,
        rstd: Array | None,
    ) -> Gradients:
        """Compute the gradients from the h that the caller got (residual_out, or x) and the forward's statistics."""

    def forward_(self, problem: Problem, x: Array, residual: Array, weight: Array | None, bias: Array | None) -> None:
        """Write y into x and residual_out into residual."""


class WritingKernels(Kernels, Protocol):
    """What a module offers besides if it can write into arrays that are given; the results of others are copied there."""

    def forward_into(
        self, problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None, out: Forward
    ) -> None:
        """Write y and residual_out into the arrays of `out`, of any strides; without a residual_out to compute that is None."""


Run = Callable[[tuple[Any, ...]], tuple[Any, ...] | None]
"""Computes a call like one before, of its six arrays, None for those that are not given: returns its four results, None for
those that there are not, and the problem. Returns None, and has computed nothing, if it is not like that one, or if an array
has no memory or shares with another what is written to."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """What is known of a call, and what tells whether another one is like it.

    Its arrays are x, residual, weight, bias, out and residual_out, and its results y, residual_out, mean and rstd. Those of a
    backward pass are dy, dresidual_out, h, weight, mean and rstd, and the gradients of x, residual, weight and bias.

    Attributes:
        problem: the call, as it was described.
        wanted: the gradients that a backward pass is to compute; None for a forward pass.
        device: where its arrays are, in their framework's terms.
        places: which of the arrays, from 0, are given; they are contiguous.
        fits: whether arrays given are like those of the call.
        make: what makes the results that are not given.
        results: which of the arrays given, then made, counted from 1, are the results; 0 for none.
        pointers: which of them kernels are told of: x, residual, weight, bias, y, residual_out, mean and rstd, or the arrays of
            a backward pass, dx, dresidual, dweight and dbias.
        pairs: for each two of them that must not share memory: which one, its bytes, which other, its bytes.
        written: places, from 0, of the arrays given that are written to and have to be counted as that.
        address_of: returns the address of an array.
        count_as_written: takes such arrays.
    """

    problem: Problem
    wanted: Wanted | None
    device: Any
    places: tuple[int, ...]
    fits: Callable[..., bool]
    make: tuple[Callable[[], Array], ...]
    results: tuple[int, ...]
    pointers: tuple[int, ...]
    pairs: tuple[tuple[int, int, int, int], ...]
    written: tuple[int, ...]
    address_of: Callable[[Array], int]
    count_as_written: Callable[[tuple[Array, ...]], object]


class PreparingKernels(Kernels, Protocol):
    """What a module for PyTorch offers besides if it can compute a call like one before without what precedes the kernels."""

    def prepare(self, guarded: Guarded) -> Run | None:
        """Return what computes calls like one that was just computed; None if it cannot."""


class DividedKernels(Kernels, Protocol):
    """What a module for JAX says besides if XLA has to be told that each device can compute the rows that it has."""

    PER_DEVICE: bool
    """True; see `normkit_jax.partition`."""
