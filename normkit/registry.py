# SPDX-License-Identifier: Apache-2.0
"""The choice: which implementation computes a problem, and why not the others."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TypeVar, cast

from .errors import LaunchError, OptionError, UnsupportedError
from .interface import Kernels
from .spec import Problem


@dataclass(frozen=True)
class Implementation:
    """One line of a table of implementations.

    Args:
        name: what `implementation=` takes.
        module: the module that has the functions of `normkit.interface.Kernels`; imported when first considered.
        automatic: the platforms on which it is chosen without being asked for; () for by name only, None for all.
    """

    name: str
    module: str
    automatic: tuple[str, ...] | None = None

    def load(self) -> Kernels:
        """Import the module."""
        return cast(Kernels, _import(self.module))


_import = cache(import_module)
Computed = TypeVar("Computed")


@dataclass(frozen=True)
class Verdict:
    """What was decided about one implementation: accepted, or the reason why not. The first one accepted runs."""

    name: str
    accepted: bool
    reason: str


def explain(problem: Problem, table: Sequence[Implementation]) -> list[Verdict]:
    """Judge every implementation of a table, in the order in which they are tried.

    Example:
        >>> from normkit.implementations import TABLE
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> problem = describe(NormSpec("rms"), Operand((4, 64), "float32"))
        >>> [verdict.name for verdict in explain(problem, TABLE) if verdict.accepted][-1]
        'reference'
    """
    return [_judge(problem, implementation) for implementation in table]


def _judge(problem: Problem, implementation: Implementation) -> Verdict:
    rejected = _rejected(problem, implementation)
    if rejected is not None:
        return Verdict(implementation.name, False, rejected)
    if not _automatic(problem, implementation):
        return Verdict(implementation.name, False, f"on {problem.platform} only by name: it is not the best choice there")
    return Verdict(implementation.name, True, f"computes this on {problem.platform}")


def _automatic(problem: Problem, implementation: Implementation) -> bool:
    return implementation.automatic is None or problem.platform in implementation.automatic


def _rejected(problem: Problem, implementation: Implementation) -> str | None:
    kernels = implementation.load()
    rejected = kernels.supports(problem)
    if rejected is None and problem.in_place and not hasattr(kernels, "forward_"):
        return "it cannot compute in place"
    return None if rejected is None else rejected.reason


def select(problem: Problem, table: Sequence[Implementation], implementation: str | None = None) -> Implementation:
    """Return the implementation asked for by name, or the first of the table that accepts the problem.

    Raises:
        OptionError: there is no implementation of that name.
        UnsupportedError: the one asked for cannot compute this problem, or (without a name) none can.
    """
    if implementation is None:
        for candidate in table:
            # the platform first: to ask a vendor's library for its verdict is to load it
            if _automatic(problem, candidate) and _rejected(problem, candidate) is None:
                return candidate
        reasons = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in explain(problem, table))
        raise UnsupportedError(f"no implementation computes this problem: {reasons}")
    asked = find(table, implementation)
    reason = _rejected(problem, asked)
    if reason is not None:
        others = [verdict.name for verdict in explain(problem, table) if verdict.accepted]
        raise UnsupportedError(
            f"implementation={implementation!r} cannot compute this: {reason}; "
            f"implementation=None would take {others[0] if others else 'none either'}"
        )
    return asked


def compute(
    problem: Problem, table: Sequence[Implementation], implementation: str | None, run: Callable[[Kernels], Computed]
) -> tuple[Kernels, Computed]:
    """Compute by the implementation asked for by name, or by the first that accepts the problem.

    One that raises LaunchError has written nothing, and from then on rejects problems like this one with the reason. Without a
    name the next one computes, and a RuntimeWarning says so.

    Args:
        problem: the call.
        table: the implementations.
        implementation: one by name.
        run: computes by the functions of an implementation.

    Returns:
        The functions of the implementation that computed, and what `run` returned.

    Raises:
        OptionError: as `select`; so does UnsupportedError, also where the one asked for by name raises LaunchError.
    """
    chosen = select(problem, table, implementation)
    while True:
        kernels = chosen.load()
        try:
            return kernels, run(kernels)
        except LaunchError as error:
            failed, failure = chosen, error
        try:
            chosen = select(problem, table, implementation)
        except UnsupportedError as error:
            raise error from failure
        if chosen is failed:
            raise failure
        warnings.warn(
            f"{failure}; calls like this one are computed by {chosen.name} from now on, not by {failed.name}",
            RuntimeWarning,
            stacklevel=2,
        )


def find(table: Sequence[Implementation], name: str) -> Implementation:
    """Return the implementation of that name.

    Raises:
        OptionError: there is none.
    """
    for candidate in table:
        if candidate.name == name:
            return candidate
    names = [candidate.name for candidate in table]
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(f"implementation={name!r} is not one of {', '.join(map(repr, names))}{hint}")
