# SPDX-License-Identifier: Apache-2.0
"""Where the rows of arrays lie in memory: any leading dimensions as two nested loops over rows, so that views need no copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class RowStrides(NamedTuple):
    """Row r of an array starts at element (r // inner_rows) * outer + (r % inner_rows) * inner."""

    outer: int
    inner: int


class RowLayout(NamedTuple):
    """The rows of several arrays of one shape. An entry of `strides` is None where that array must be copied first."""

    inner_rows: int
    strides: tuple[RowStrides | None, ...]


def classify(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> str:
    """Return "contiguous", "rows" (unit stride along each row) or "strided", as `Problem.layout` has it.

    Example:
        >>> classify((2, 3), [(3, 1)]), classify((2, 3), [(3, 1), (9, 1)]), classify((2, 3), [(1, 2)])
        ('contiguous', 'rows', 'strided')
    """
    if all(_is_contiguous(shape, own) for own in strides):
        return "contiguous"
    if shape[-1] == 1 or all(own[-1] == 1 for own in strides):
        return "rows" if None not in row_layout(shape, strides).strides else "strided"
    return "strided"


def row_layout(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> RowLayout:
    """Find the split of the leading dimensions into two groups that suits the most arrays.

    Args:
        shape: the shape all arrays have; the last dimension is the row.
        strides: for each array the strides of all dimensions, in elements.

    Example: the queries in a packed (batch, sequence, 3, heads, 64) projection, and a contiguous array of their shape.
        >>> row_layout((2, 5, 8, 64), [(5 * 1536, 1536, 64, 1), (2560, 512, 64, 1)])
        RowLayout(inner_rows=8, strides=(RowStrides(outer=1536, inner=64), RowStrides(outer=512, inner=64)))
    """
    leading = shape[:-1]
    candidates = []
    for split in range(len(leading), -1, -1):
        inner_rows = math.prod(leading[split:])
        found = tuple(_nest(shape, own, split) for own in strides)
        candidates.append(RowLayout(inner_rows, found))
    return min(candidates, key=lambda layout: layout.strides.count(None))


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of an array may lie in one place, as in an expanded array.

    Example:
        >>> overlaps_itself((4, 8), (8, 1)), overlaps_itself((4, 8), (0, 1)), overlaps_itself((4, 8), (4, 1))
        (False, True, True)
    """
    extent = 1
    for step, size in sorted((abs(step), size) for size, step in zip(shape, strides, strict=True) if size > 1):
        if step < extent:
            return 0 not in shape
        extent = step * (size - 1) + extent
    return False


def _nest(shape: Sequence[int], own: Sequence[int], split: int) -> RowStrides | None:
    if own[-1] != 1 and shape[-1] != 1:
        return None
    outer = _collapse(shape[:split], own[:split])
    inner = _collapse(shape[split:-1], own[split:-1])
    return None if outer is None or inner is None else RowStrides(outer, inner)


def _collapse(shape: Sequence[int], own: Sequence[int]) -> int | None:
    """Return the one stride with which a single loop visits these dimensions in order, or None if there is none."""
    stride, expected = 0, None
    for size, step in reversed(list(zip(shape, own, strict=True))):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride


def _is_contiguous(shape: Sequence[int], own: Sequence[int]) -> bool:
    expected = 1
    for size, step in reversed(list(zip(shape, own, strict=True))):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
