# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: where they are, why they are not there, and a call of them as the bytes that they read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from struct import Struct
from typing import Any, NamedTuple

from ..interface import Rejected
from ..spec import Problem
from .build import LIBRARY, digest

FASTEST = -1
"""The level to ask for: the fastest for the call that the processor has; others are the bits of `Library.levels`, from 0."""

OWN_THREADS = (0, 0)

_CODES = {None: 0, "float32": 0, "bfloat16": 1, "float16": 2}
_ROUNDINGS = {None: 0, "sum": 0, "stored": 1, "hf": 2}
# the fields of the structs of arguments.hpp
_FORWARD = Struct("=8q q 8q 3q 2d 6q 5q").pack
_BACKWARD = Struct("=10q q 6q 3q d 7q 3q").pack
# elements of a call that is done in some ten microseconds
_QUICK = 131072


class Library(NamedTuple):
    """The compiled kernels.

    Attributes:
        forward: takes the bytes of a struct and returns 0.
        backward: as forward.
        prepare: see `normkit.cpu.prepared`; None where the functions of CPython that it calls are not there.
        levels: the levels of instructions there are.
        ffi_forward: forward as a handler of custom calls of XLA, whose address alone is of use.
        ffi_backward: the same.
        ffi_callback: the handler of custom calls that come back to Python; see `normkit.vendors.custom_call`.
    """

    forward: Callable[[bytes], int]
    backward: Callable[[bytes], int]
    prepare: Callable[..., Any] | None
    levels: tuple[int, ...]
    ffi_forward: Any
    ffi_backward: Any
    ffi_callback: Any


class Missing(NamedTuple):
    """Why there are no kernels."""

    reason: str


@cache
def load() -> Library | Missing:
    """Load the compiled kernels, once."""
    if not LIBRARY.exists():
        return Missing("its kernels are not compiled: install a C++ compiler, then python -m normkit.cpu.build")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        holding_python = ctypes.PyDLL(str(LIBRARY))
        prepare = holding_python.normkit_prepare
        functions = library.normkit_forward, library.normkit_backward
        handlers = library.normkit_ffi_forward, library.normkit_ffi_backward, library.normkit_ffi_callback
        levels = library.normkit_levels()
        compiled_from = ctypes.CFUNCTYPE(ctypes.c_char_p)(("normkit_digest", library))()
    except (OSError, AttributeError) as error:
        return Missing(f"its compiled kernels cannot be loaded: {error}; python -m normkit.cpu.build compiles them anew")
    if compiled_from != digest().encode():
        return Missing(
            "its kernels were compiled from other sources than these: python -m normkit.cpu.build compiles them anew"
        )
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    has_python = holding_python.normkit_has_python()
    prepare.argtypes, prepare.restype = [ctypes.c_char_p] * 2 + [ctypes.py_object] * 5, ctypes.py_object
    return Library(
        *functions,
        prepare if has_python else None,
        tuple(level for level in range(levels.bit_length()) if levels >> level & 1),
        *handlers,
    )


@cache
def threads() -> int:
    """Return how many threads to use: as many as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def supports(problem: Problem) -> Rejected | None:
    """Accept float32, bfloat16 and float16 on the CPU, where the kernels are compiled."""
    if problem.platform != "cpu":
        return Rejected(f"it runs on cpu, not on {problem.platform}")
    if "float64" in (*problem.dtypes, problem.out_dtype, problem.residual_out_dtype):
        return Rejected("the CPU kernels compute in float32, which is not enough for float64")
    if problem.in_place and problem.layout == "strided":
        return Rejected("in place, the CPU kernels need unit stride along the row, and rows reached by two nested loops")
    library = load()
    return Rejected(library.reason) if isinstance(library, Missing) else None


def forward(
    problem: Problem,
    pointers: Sequence[int],
    rows: tuple[int, ...],
    inner_rows: int,
    threads: int,
    openmp: tuple[int, int] = OWN_THREADS,
    level: int = FASTEST,
) -> None:
    """Run the forward kernels; the arguments are those of `packed_forward`."""
    if problem.rows:
        _check(loaded().forward(packed_forward(problem, pointers, rows, inner_rows, threads, openmp, level)))


def packed_forward(
    problem: Problem,
    pointers: Sequence[int],
    rows: tuple[int, ...],
    inner_rows: int,
    threads: int,
    openmp: tuple[int, int] = OWN_THREADS,
    level: int = FASTEST,
) -> bytes:
    """Return a forward call as the kernels read it.

    Args:
        problem: the call.
        pointers: of x, residual, weight, bias, y, residual_out, mean and rstd; 0 for what there is not.
        rows: outer and inner stride of x, residual, y and residual_out, in elements; see `normkit.layout`.
        inner_rows: rows of the inner loop.
        threads: the most to use.
        openmp: addresses of GNU OpenMP's GOMP_parallel and omp_get_thread_num, to use its threads; 0 for threads of our own.
        level: of instructions.
    """
    spec = problem.spec
    return _FORWARD(
        *pointers, threads, *rows, problem.rows, inner_rows, problem.hidden_size, spec.eps, spec.weight_offset,
        _CODES[problem.x_dtype], _CODES[problem.residual_dtype], _CODES[problem.weight_dtype], _CODES[problem.bias_dtype],
        _CODES[problem.out_dtype], _CODES[problem.residual_out_dtype],
        spec.kind == "layer", _ROUNDINGS[spec.rounding], level, *openmp,
    )  # fmt: skip


def packed_without_pointers(
    problem: Problem, threads: int, openmp: tuple[int, int] = OWN_THREADS, is_backward: bool = False
) -> bytes:
    """Return a call of contiguous rows, whose pointers, its first fields, are still to come; see `packed_forward`."""
    row = problem.hidden_size, 0
    if is_backward:
        return packed_backward(problem, (0,) * 10, row * 3, 1, threads, openmp)
    return packed_forward(problem, (0,) * 8, row * 4, 1, threads, openmp)


def is_quick(problem: Problem) -> bool:
    """Whether a call is done in some ten microseconds, so that to let go of the interpreter takes longer than it is worth."""
    return problem.rows * problem.hidden_size < _QUICK


def backward(
    problem: Problem,
    pointers: Sequence[int],
    rows: tuple[int, ...],
    inner_rows: int,
    threads: int,
    openmp: tuple[int, int] = OWN_THREADS,
    level: int = FASTEST,
) -> None:
    """Run the backward kernels; the arguments are those of `packed_backward`."""
    _check(loaded().backward(packed_backward(problem, pointers, rows, inner_rows, threads, openmp, level)))


def packed_backward(
    problem: Problem,
    pointers: Sequence[int],
    rows: tuple[int, ...],
    inner_rows: int,
    threads: int,
    openmp: tuple[int, int] = OWN_THREADS,
    level: int = FASTEST,
) -> bytes:
    """Return a backward call as the kernels read it.

    Args:
        problem: the call.
        pointers: of dy, dresidual_out, h, weight, mean, rstd, dx, dresidual, dweight and dbias; 0 for what there is not.
        rows: outer and inner stride of dy, dresidual_out and h, in elements; see `normkit.layout`.
        inner_rows: rows of the inner loop.
        threads: the most to use.
        openmp: as in `packed_forward`.
        level: of instructions.
    """
    return _BACKWARD(
        *pointers, threads, *rows, problem.rows, inner_rows, problem.hidden_size, problem.spec.weight_offset,
        _CODES[problem.out_dtype], _CODES[problem.h_dtype], _CODES[problem.weight_dtype],
        _CODES[problem.x_dtype], _CODES[problem.residual_dtype], _CODES[problem.weight_dtype], _CODES[problem.bias_dtype],
        level, *openmp,
    )  # fmt: skip


def loaded() -> Library:
    """Return the kernels, after `supports` has accepted."""
    library = load()
    assert isinstance(library, Library)
    return library


def _check(status: int) -> None:
    if status:
        raise MemoryError("the CPU kernels could not allocate their scratch memory")
