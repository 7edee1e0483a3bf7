# SPDX-License-Identifier: Apache-2.0
"""Which memory a call may read and write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normkit.call import Call
from normkit.errors import OptionError
from normkit.memory import check_written


def check_memory(tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors whose memory was freed, which kernels would take for tensors that there are not, or read at any address.

    Args:
        tensors: by name; None for one that there is not.

    Raises:
        OptionError: a tensor has elements, and its storage no bytes.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes():
            raise OptionError(
                f"{name} has shape {tuple(tensor.shape)} and no memory, as while a parameter is sharded or offloaded: "
                "its storage has 0 bytes; gather or load it before the call"
            )


def check_writes(call: Call) -> None:
    """Refuse a call that cannot write to its tensors without changing others.

    Raises:
        OptionError: a tensor has no memory; one to write to comes from torch.inference_mode(), an element of it has several
            places, or it shares memory with another tensor of the call.
    """
    check_memory(call.arrays | call.outputs)
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
