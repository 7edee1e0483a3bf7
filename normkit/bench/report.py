# SPDX-License-Identifier: Apache-2.0
"""What is shown and kept of a benchmark: the table, the summary, and the CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TextIO

from ..errors import OptionError
from ..models import require
from .compete import Absent, Row
from .contestants import COPY, TABLE

QUIET = 2.0
"""On a machine that does nothing else, the copy's 80th percentile is less than so many times its 20th."""

FEW_ROWS = 16
"""Cases of at most so many rows, as in decoding, have a mean of their own."""

_FIELDS = tuple(field.name for field in fields(Row))


def column(field: str) -> str:
    """Return the name of the column of a field of Row."""
    return field.removesuffix("_")


COLUMNS = (*map(column, _FIELDS), "within_bounds")


class Writer:
    """Writes rows into a CSV file as they come, each with the circumstances."""

    def __init__(self, file: TextIO, circumstances: dict[str, str]) -> None:
        self._file, self._circumstances = file, circumstances
        self._writer = csv.DictWriter(file, (*COLUMNS, *circumstances))
        self._writer.writeheader()

    def write(self, rows: Iterable[Row]) -> None:
        """Write rows, so that they are there even if what follows fails."""
        for row in rows:
            values = {column(name): getattr(row, name) for name in _FIELDS}
            self._writer.writerow(values | {"within_bounds": row.within_bounds} | self._circumstances)
        self._file.flush()


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file.

    Raises:
        OptionError: it cannot be read, or is none that `normkit bench` wrote.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row(**_row(line)) for line in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
        raise OptionError(
            f"cannot read {path}: {type(error).__name__}: {error}; pass a CSV file that normkit bench wrote"
        ) from error


def table(rows: Sequence[Row]) -> str:
    """Return the main columns as text, which is Markdown too."""
    (tabulate,) = require("tabulate", extra="bench")
    heads = (
        "case",
        "dtype",
        "kind",
        "pass",
        "clock",
        "contestant",
        "us",
        "p20 to p80",
        "GB/s",
        "% of copy",
        "x normkit",
        "error",
    )
    lines = [
        (
            *(row.case, row.dtype, row.kind, row.pass_, row.clock, f"{row.contestant}{_of(row)}"),
            *(_short(row.us_median), f"{_short(row.us_p20)} to {_short(row.us_p80)}"),
            *(_short(row.gb_per_s), _short(row.percent_of_copy), _short(row.ratio_to_normkit)),
            _error(row),
        )
        for row in rows
    ]
    alignment = ("left",) * 6 + ("right",) * 6
    return str(tabulate.tabulate(lines, heads, tablefmt="github", colalign=alignment, disable_numparse=True))


def summary(rows: Sequence[Row]) -> str:
    """Return geometric means of the ratios to normkit, over all cases and over those of few rows."""
    (tabulate,) = require("tabulate", extra="bench")
    without = {COPY, *(contestant.name for contestant in TABLE if contestant.ours)}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.contestant not in without and row.ratio_to_normkit is not None:
            groups.setdefault((row.contestant, row.pass_, row.clock, row.kind, row.dtype), []).append(row)
    lines = []
    for group, of in groups.items():
        few = [row for row in of if row.rows <= FEW_ROWS]
        lines.append((*group, len(of), _mean(of), len(few), _mean(few)))
    if not lines:
        return "There is nothing to compare with normkit."
    heads = ("contestant", "pass", "clock", "kind", "dtype", "cases", "x normkit", f"of <= {FEW_ROWS} rows", "x normkit")
    alignment = ("left",) * 5 + ("right",) * 4
    text = tabulate.tabulate(lines, heads, tablefmt="github", colalign=alignment, disable_numparse=True)
    return f"Time as a multiple of normkit's for the same framework, geometric means over cases:\n\n{text}"


def warning(rows: Sequence[Row]) -> str:
    """Return what to say of a machine on which a copy takes now one time, now another; "" on a quiet one."""
    copies = [row for row in rows if row.contestant == COPY]
    busy = [row for row in copies if row.us_p80 > QUIET * row.us_p20]
    if not busy:
        return ""
    worst = max(busy, key=lambda row: row.us_p80 / row.us_p20)
    spread = f"from {_short(worst.us_p20)} to {_short(worst.us_p80)} us (p20 to p80)"
    return (
        f"The machine was NOT QUIET in {len(busy)} of {len(copies)} contests, whose figures mean nothing: the copy's times "
        f"spread more than {QUIET:g} fold, in {worst.case} {spread}. Run this while nothing else runs."
    )


def not_run(absent: Sequence[Absent], contests: int) -> str:
    """Return who did not take part, in how many of the contests, and why."""
    found: dict[str, list[Absent]] = {}
    for each in absent:
        found.setdefault(each.reason, []).append(each)
    lines = []
    for reason, of in found.items():
        names = ", ".join(dict.fromkeys(each.contestant for each in of))
        lines.append(f"  {names} in {len({each.contest for each in of})} of {contests}: {reason}")
    return "\n".join(["Not run:", *lines]) if lines else "Everything ran."


def _of(row: Row) -> str:
    return f" ({row.implementation})" if row.implementation else ""


def _error(row: Row) -> str:
    if row.worst_error is None:
        return ""
    return f"{row.worst_error:.2f}" if row.worst_error <= 1 else f"{row.worst_error:.3g}, BEYOND"


def _mean(rows: Sequence[Row]) -> str:
    ratios = [row.ratio_to_normkit for row in rows if row.ratio_to_normkit is not None]
    return f"{geometric_mean(ratios):.2f}" if ratios else ""


def _short(value: float | None) -> str:
    """Return a number with about three digits."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _row(line: dict[str, str]) -> dict[str, Any]:
    # files from before there were clocks have no such column
    return {name: _parsed(name, line[column(name)]) for name in _FIELDS if name != "clock" or name in line}


def _parsed(name: str, text: str) -> Any:
    kind = Row.__annotations__[name]
    if kind == "str":
        return text
    return int(text) if kind == "int" else float(text) if text or "None" not in kind else None
