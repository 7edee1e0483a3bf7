# SPDX-License-Identifier: Apache-2.0
"""Why calls with some of the kernels are no longer accepted: Triton could not compile, load or launch one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from normkit.errors import LaunchError
from normkit.spec import Problem

_failed: dict[Problem, str] = {}


def reason(problem: Problem) -> str | None:
    """Return why a call with kernels like this one's failed, None if none did."""
    return _failed.get(_with_its_kernels(problem)) if _failed else None


@contextmanager
def remembered(problem: Problem) -> Iterator[None]:
    """Remember a LaunchError that is raised meanwhile."""
    try:
        yield
    except LaunchError as error:
        _failed[_with_its_kernels(problem)] = str(error)
        raise


def _with_its_kernels(problem: Problem) -> Problem:
    """Return the problem of one row: kernels are the same for any number of rows."""
    return replace(problem, shape=problem.shape[-1:])
