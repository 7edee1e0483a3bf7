# SPDX-License-Identifier: Apache-2.0
"""The plot: percent of the copy's bandwidth, on a logarithmic scale, by hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..models import require
from .compete import Row
from .contestants import COPY

SUFFIXES = (".png", ".svg")


def check(path: Path) -> None:
    """Refuse a file that could not be drawn, before anything is measured.

    Raises:
        OptionError: its name ends in none of SUFFIXES.
        MissingPackageError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise OptionError(f"--plot draws {' or '.join(SUFFIXES)}, got {path}")
    require("matplotlib", extra="bench")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel for each pass, clock, kind and dtype: cases in the order of their hidden size, a line for each contestant.

    Raises:
        OptionError: there is nothing to draw.
    """
    (figures,) = require("matplotlib.figure", extra="bench")
    shown = [row for row in rows if row.contestant != COPY and row.percent_of_copy is not None]
    if not shown:
        raise OptionError(f"there is nothing to draw in {path}: no contestant has a row")
    cases = sorted({(row.hidden_size, row.rows, row.case) for row in shown})
    names = list(dict.fromkeys(row.contestant for row in shown))
    passes = list(dict.fromkeys((row.pass_, row.clock) for row in shown))
    columns = list(dict.fromkeys((row.kind, row.dtype) for row in shown))
    size = (1 + 3.5 * len(columns), 1 + 2.8 * len(passes))
    figure = figures.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(passes), len(columns), squeeze=False, sharex=True, sharey="row")
    for line, (pass_, clock) in zip(panels, passes, strict=True):
        for panel, column in zip(line, columns, strict=True):
            of = [row for row in shown if (row.pass_, row.clock, row.kind, row.dtype) == (pass_, clock, *column)]
            _panel(panel, of, cases, names)
            panel.set_title(", ".join((pass_, *column, *(() if clock == "host" else (clock,)))), fontsize="small")
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=len(names), fontsize="small")
    figure.supylabel("% of the copy's bandwidth")
    figure.supxlabel("rows x hidden size")
    figure.savefig(path, dpi=150)


def _panel(panel: Any, rows: Sequence[Row], cases: list[tuple[int, int, str]], names: list[str]) -> None:
    places = {case: place for place, (_, _, case) in enumerate(cases)}
    for number, name in enumerate(names):
        points = sorted((places[row.case], row.percent_of_copy) for row in rows if row.contestant == name)
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, color=f"C{number}", label=name)
    panel.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(cases)), [case for _, _, case in cases], rotation=45, ha="right", fontsize="x-small")
    panel.set_yscale("log")
