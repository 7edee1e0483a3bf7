# SPDX-License-Identifier: Apache-2.0
"""What an implementation in Python would prepare, with the CPU kernels in the place of Triton's, which need a GPU."""

from __future__ import annotations

from struct import Struct

import torch

from normkit.cpu import library
from normkit.interface import Guarded, Run
from normkit.prepared import in_python


def prepare(guarded: Guarded) -> Run:
    """Return what computes calls like one before."""
    is_backward = guarded.wanted is not None
    pointers = Struct(f"={10 if is_backward else 8}q")
    rest = library.packed_without_pointers(guarded.problem, torch.get_num_threads(), is_backward=is_backward)[pointers.size :]
    kernels = library.loaded().backward if is_backward else library.loaded().forward
    return in_python(guarded, lambda addresses: kernels(pointers.pack(*addresses) + rest))
