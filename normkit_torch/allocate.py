# SPDX-License-Identifier: Apache-2.0
"""Memory for results, on the CPU by the function that torch.compile's programs use: in half the time of `torch.empty`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cpu  # type: ignore[attr-defined]


def maker(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return what makes contiguous tensors."""
    strides = tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()
    if device.type == "cpu":
        return partial(_empty_strided_cpu, shape, strides, dtype)
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
