# SPDX-License-Identifier: Apache-2.0
"""A callback on the CPU by normkit's compiled library: a custom call that gives a Python function the addresses of its buffers.

For each buffer of `buffer_callback`, JAX makes an object, from which torch then makes a tensor. XLA hands out the same
addresses again and again, so that here all that can be made of them is made once. What is left is as little Python as can be:
in a program nothing of it is in the processor's caches, and each of its lines takes two to three times as long as in a loop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from math import prod
from struct import Struct
from typing import Any, NamedTuple
from uuid import uuid4

from ..cpu import library

# bytes, with the 0 at the end, and what says that the function has run to its end; the same in normkit/cpu/callback.cpp
_MESSAGE = 1024
_DONE = 0x600D
# sets of addresses that are remembered: of the norms of one shape in a model, in some places of memory each
_KEPT = 512
_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Buffer(NamedTuple):
    """Contiguous memory of the program."""

    dtype: str
    shape: tuple[int, ...]


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


def function(run: Callable[..., object], given: Callable[..., Sequence[Any]], buffers: Sequence[Buffer]) -> Any:
    """Return a function for the custom call; its address is good as long as it lives.

    Args:
        run: is called with what `given` returns.
        given: makes the arguments of `run` of tensors, once for all calls with the same addresses.
        buffers: what each operand is, and then each result.
    """
    arguments = arguments_at(given, buffers)
    size, string_at = ctypes.sizeof(ctypes.c_void_p) * len(buffers), ctypes.string_at

    def called(addresses: int, message: int) -> int:
        try:
            run(*arguments(string_at(addresses, size)))
        # Any exception: there is only XLA to take it. What is raised before or after this, as by a signal, ctypes drops, and
        # the result is then not this number.
        except BaseException as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace")[: _MESSAGE - 1]
            ctypes.memmove(message, text + b"\0", len(text) + 1)
            return 0
        return _DONE

    return _FUNCTION(called)


def arguments_at(given: Callable[..., Sequence[Any]], buffers: Sequence[Buffer]) -> Callable[[bytes], Sequence[Any]]:
    """Return what makes arguments of addresses, of which it remembers some.

    Tensors may outlive their memory, and are of no use outside of the call that the memory is lent to.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    kinds = [getattr(torch, buffer.dtype) for buffer in buffers]
    memory = [ctypes.c_char * (prod(buffer.shape) * kind.itemsize) for buffer, kind in zip(buffers, kinds, strict=True)]
    unpack = Struct(f"{len(buffers)}P").unpack

    @lru_cache(_KEPT)
    def arguments(addresses: bytes) -> Sequence[Any]:
        # those that it makes in one thread's modes would be met in another's
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
            described = zip(unpack(addresses), memory, kinds, buffers, strict=True)
            return given(
                *(
                    torch.frombuffer(room.from_address(at), dtype=kind).view(buffer.shape)
                    for at, room, kind, buffer in described
                )
            )

    return arguments
