# SPDX-License-Identifier: Apache-2.0
"""What writing into arrays that are given needs to know of memory: no element in two places, no two arrays in one."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from .arrays import Array
from .errors import OptionError
from .layout import overlaps_itself

# Steps of NumPy's exact search for a shared element, which may take exponentially many; past these it counts as shared.
_MAX_WORK = 100_000


def check_written(written: Mapping[str, Array], read: Mapping[str, Array], how: str, advice: str) -> None:
    """Refuse arrays of NumPy or torch that cannot be written to without changing themselves or one another.

    Args:
        written: those to be written to, by name.
        read: the other ones of the call.
        how: what an error begins with.
        advice: what an error ends with.

    Raises:
        OptionError: an element of an array that is written to has several places, or it shares memory with another array.

    Example:
        >>> x = np.ones((4, 8))
        >>> check_written({"out": np.empty((4, 8))}, {"x": x, "residual": x}, "", "give another array")
    """
    for name, array in written.items():
        if not _is_contiguous(array) and overlaps_itself((*array.shape, array.itemsize), (*_byte_strides(array), 1)):
            raise OptionError(
                f"{how}{name} is written to, and shape {tuple(array.shape)} with strides of {_byte_strides(array)} bytes puts "
                f"several elements in one place, as expanded arrays do; {advice}"
            )
    everything = [(name, array, *_extent(array)) for name, array in (*written.items(), *read.items())]
    for index, (first, one, start, end) in enumerate(everything[: len(written)]):
        for second, other, other_start, other_end in everything[index + 1 :]:
            if start < other_end and other_start < end and _share_elements(one, other):
                raise OptionError(f"{how}{first} is written to, and must not share memory with {second}; {advice}")


def _share_elements(first: Array, second: Array) -> bool:
    try:
        return np.shares_memory(_addresses(first), _addresses(second), max_work=_MAX_WORK)  # type: ignore[arg-type]  # any number, says NumPy's documentation
    except np.exceptions.TooHardError:
        return True


def _is_contiguous(array: Array) -> bool:
    return bool(array.flags.c_contiguous if isinstance(array, np.ndarray) else array.is_contiguous())


def _byte_strides(array: Array) -> tuple[int, ...]:
    if isinstance(array, np.ndarray):
        return array.strides
    return tuple(step * array.itemsize for step in array.stride())


def _start(array: Array) -> int:
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
    return address


def _extent(array: Array) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one past the last."""
    start = _start(array)
    if _is_contiguous(array):
        return start, start + array.nbytes
    if 0 in array.shape:
        return start, start
    ways = [(size - 1) * step for size, step in zip(array.shape, _byte_strides(array), strict=True)]
    return start + sum(way for way in ways if way < 0), start + sum(way for way in ways if way > 0) + array.itemsize


def _addresses(array: Array) -> np.ndarray[Any, Any]:
    """Return the array as NumPy sees it, on any device: its memory is not read, only its addresses are compared."""
    interface = {
        "version": 3,
        "data": (_start(array), False),
        "shape": tuple(array.shape),
        "strides": _byte_strides(array),
        "typestr": f"|V{array.itemsize}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
