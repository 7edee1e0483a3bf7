# SPDX-License-Identifier: Apache-2.0
"""What writing in place needs to know of memory: no element in two places, no two tensors in one."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from normkit.call import Call
from normkit.errors import OptionError
from normkit.layout import overlaps_itself

# Steps of NumPy's exact search for a shared element, which may take exponentially many; past these it counts as shared.
_MAX_WORK = 100_000


def check_in_place(call: Call) -> None:
    """Refuse tensors of an in-place call that cannot be written to without changing one another.

    Raises:
        OptionError: an element of x or residual has several places, or two of the tensors share memory.
    """
    tensors = call.arrays
    if call.x.is_meta:
        return  # there is no memory
    for name in ("x", "residual"):
        if tensors[name].is_inference() and not torch.is_inference_mode_enabled():
            raise OptionError(
                f"in place, {name} is written to, and it comes from torch.inference_mode(), outside of which it is read-only"
            )
        if overlaps_itself(tensors[name].shape, tensors[name].stride()):
            shape, strides = tuple(tensors[name].shape), tensors[name].stride()
            raise OptionError(
                f"in place, {name} is written to, and shape {shape} with strides {strides} puts several elements in one place, "
                f"as expanded tensors do; use a copy, or {call.function[:-1]}"
            )
    for first, second in combinations(tensors, 2):
        if (first, second) != ("weight", "bias") and _share_memory(tensors[first], tensors[second]):
            raise OptionError(
                f"in place, x and residual are written to, and {first} and {second} must not share memory; "
                f"use a copy, or {call.function[:-1]}"
            )


def _share_memory(first: Tensor, second: Tensor) -> bool:
    (a, a_end), (b, b_end) = _extent(first), _extent(second)
    if a >= b_end or b >= a_end:
        return False
    try:
        return np.shares_memory(_addresses(first), _addresses(second), max_work=_MAX_WORK)  # type: ignore[arg-type]  # any number, says NumPy's documentation
    except np.exceptions.TooHardError:
        return True


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one past the last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _addresses(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    """Return the tensor as NumPy sees it, on any device: its memory is not read, only its addresses are compared."""
    size = tensor.element_size()
    interface = {
        "version": 3,
        "data": (tensor.data_ptr(), False),
        "shape": tuple(tensor.shape),
        "strides": tuple(step * size for step in tensor.stride()),
        "typestr": f"|V{size}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
