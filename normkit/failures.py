# SPDX-License-Identifier: Apache-2.0
"""Kernels that Triton could not compile, load or launch: which errors say so, and which calls are no longer accepted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import ENOMEM
from textwrap import shorten

from .errors import LaunchError
from .spec import Problem


class Failures:
    """Why calls with some of an implementation's kernels are no longer accepted."""

    def __init__(self) -> None:
        self._reasons: dict[Problem, str] = {}

    def reason(self, problem: Problem) -> str | None:
        """Return why a call with kernels like this one's failed, None if none did."""
        return self._reasons.get(_with_its_kernels(problem)) if self._reasons else None

    @contextmanager
    def remembered(self, problem: Problem) -> Iterator[None]:
        """Remember a LaunchError that is raised meanwhile."""
        try:
            yield
        except LaunchError as error:
            self._reasons[_with_its_kernels(problem)] = str(error)
            raise


def _with_its_kernels(problem: Problem) -> Problem:
    """Return the problem of one row, with numbers that a kernel is given when it is launched left out."""
    return replace(problem, shape=problem.shape[-1:], spec=replace(problem.spec, eps=0.0, weight_offset=0.0))


def triton_errors() -> tuple[type[Exception], ...]:
    """Return the errors with which Triton, its compilers and the driver fail; they are not those of a wrong call."""
    errors = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return errors
    return *errors, TritonError


def is_short_of_memory(error: Exception) -> bool:
    """Whether an error is for want of memory, which says nothing of other calls."""
    return "out of memory" in str(error).lower() or getattr(error, "errno", None) == ENOMEM


def could_not(what: str, kernel: str, error: Exception) -> str:
    """Return the sentence about a failure of Triton's.

    Args:
        what: Triton could not do.
        kernel: its name.
        error: one of `triton_errors`.

    Example:
        >>> could_not("compile", "forward_rows", OSError("no space left"))
        'Triton could not compile forward_rows: OSError: no space left'
    """
    return f"Triton could not {what} {kernel}: {type(error).__name__}: {shorten(str(error), 300)}"
