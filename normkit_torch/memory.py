# SPDX-License-Identifier: Apache-2.0
"""Which tensors a call may write to."""

from __future__ import annotations

import torch

from normkit.call import Call
from normkit.errors import OptionError
from normkit.memory import check_written


def check_writes(call: Call) -> None:
    """Refuse tensors of a call that cannot be written to without changing one another.

    Raises:
        OptionError: a tensor to write to comes from torch.inference_mode(), an element of it has several places, or it shares
            memory with another tensor of the call.
    """
    written, read = call.outputs, call.arrays
    how, advice = "", "give another tensor"
    if call.function.endswith("_"):
        written = {name: read.pop(name) for name in ("x", "residual")}
        how, advice = "in place, ", f"use a copy, or {call.function[:-1]}"
    elif call.returns_residual:
        advice = f"give another tensor, or use {call.function}_, which works in place"
    if call.x.is_meta:
        return  # there is no memory
    for name, tensor in written.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise OptionError(
                f"{how}{name} is written to, and it comes from torch.inference_mode(), outside of which it is read-only"
            )
    check_written(written, read, how, advice)
