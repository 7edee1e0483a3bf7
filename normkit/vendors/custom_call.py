# SPDX-License-Identifier: Apache-2.0
"""A callback on the CPU by normkit's compiled library: a custom call that gives a Python function the addresses of its buffers.

For each buffer of `buffer_callback`, JAX makes an object, from which torch then makes a tensor. XLA hands out the same
addresses again and again, so that here a tensor is made once for each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any
from uuid import uuid4

from ..cpu import library

# bytes, with the 0 at the end, and what says that the function has run to its end; the same in normkit/cpu/callback.cpp
_MESSAGE = 1024
_DONE = 0x600D
# addresses of rows that are remembered, and of weights
_KEPT = 64
_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@cache
def target() -> str | None:
    """Return the name by which XLA knows the custom call, None where the library is not compiled or XLA does not take it.

    No other process has this name: a program that went there, from JAX's cache, would hold an address of this one.
    """
    import jax

    found = library.load()
    if isinstance(found, library.Missing):
        return None
    name = f"normkit_callback_{uuid4().hex}"
    try:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(found.ffi_callback), platform="cpu")
    except jax.errors.JaxRuntimeError:
        return None
    return name


def function(run: Callable[..., None], tensors: Sequence[Callable[[int], Any]]) -> Any:
    """Return a function for the custom call; its address is good as long as it lives.

    Args:
        run: is called with the tensors.
        tensors: make one of the address of each operand, then of each result.
    """
    addresses_at = (ctypes.c_int64 * len(tensors)).from_address

    def called(addresses: int, message: int) -> int:
        try:
            run(*[tensor(address) for tensor, address in zip(tensors, addresses_at(addresses), strict=True)])
        # Any exception: there is only XLA to take it. What is raised before or after this, as by a signal, ctypes drops, and
        # the result is then not this number.
        except BaseException as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace")[: _MESSAGE - 1]
            ctypes.memmove(message, text + b"\0", len(text) + 1)
            return 0
        return _DONE

    return _FUNCTION(called)


def tensors_at(dtype: str, shape: tuple[int, ...]) -> Callable[[int], Any]:
    """Return what makes contiguous tensors over memory on the CPU, of which it remembers some.

    A tensor may outlive its memory, and is of no use outside of the call that the memory is lent to.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    kind = getattr(torch, dtype)
    memory_at = (ctypes.c_char * (prod(shape) * kind.itemsize)).from_address

    @lru_cache(_KEPT)
    def tensor_at(address: int) -> Any:
        # those that it makes in one thread's modes would be met in another's
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
            return torch.frombuffer(memory_at(address), dtype=kind).view(shape)

    return tensor_at
