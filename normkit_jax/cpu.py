# SPDX-License-Identifier: Apache-2.0
"""The `cpu` implementation: the C++ kernels of normkit.cpu as custom calls in the compiled program."""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

import jax
import numpy as np

from normkit.arrays import Array, cast, numpy_dtype
from normkit.cpu import library
from normkit.cpu.build import digest
from normkit.interface import Forward, Gradients, Rejected, Wanted
from normkit.spec import Problem

from .operands import Signature, backward_signature, forward_signature

PER_DEVICE = True
"""Whether XLA has to be told that each device can compute the rows it has; see `normkit_jax.partition`."""

# other kernels are other targets: a program from JAX's cache, made with those, is not taken for one with these
_FORWARD, _BACKWARD = f"normkit_cpu_forward_{digest()}", f"normkit_cpu_backward_{digest()}"
_registering = Lock()


def supports(problem: Problem) -> Rejected | None:
    """Accept float32, bfloat16 and float16 on the CPU, in programs of this process, where the kernels are compiled."""
    if rejected := library.supports(problem):
        return rejected
    if problem.portable:
        return Rejected("its custom calls are of this process, and the program is for others or for several platforms")
    if not all(isinstance(size, int) for size in problem.shape):
        return Rejected(f"its custom calls need sizes known while compiling, and the shape is {problem.shape}")
    if problem.spread:
        return Rejected(
            "the program is for several devices, and no array of this call is in a mesh of them while JAX traces: "
            "shard one by a NamedSharding before, or use jax.set_mesh or jax.shard_map"
        )
    with _registering:
        return _register()


@cache
def _register() -> Rejected | None:
    """Give XLA the addresses of the kernels."""
    kernels = library.load()
    assert isinstance(kernels, library.Library)  # supports has accepted
    for name, handler in ((_FORWARD, kernels.ffi_forward), (_BACKWARD, kernels.ffi_backward)):
        try:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
        except jax.errors.JaxRuntimeError as error:
            return Rejected(f"this jaxlib does not take its custom calls: {error}")
    return None


def forward(problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Forward:
    """Compute y, residual_out and, if a backward may follow, the statistics."""
    signature = forward_signature(problem)
    packed = library.packed_forward(problem, _there(signature), (problem.hidden_size, 0) * 4, 1, library.threads())
    aliases = {0: 0, 1: 1} if problem.in_place else {}
    return Forward(*_call(_FORWARD, signature, packed, aliases, x, residual, weight, bias))


# JAX's arrays do not change: in place says which memory XLA may give to y and residual_out, and forward passes that on.
forward_ = forward


def backward(
    problem: Problem,
    wanted: Wanted,
    dy: Array,
    dresidual_out: Array | None,
    h: Array,
    weight: Array | None,
    mean: Array | None,
    rstd: Array | None,
) -> Gradients:
    """Compute the gradients, dweight and dbias by partial sums over a fixed division of the rows."""
    signature = backward_signature(problem, wanted)
    packed = library.packed_backward(problem, _there(signature), (problem.hidden_size, 0) * 3, 1, library.threads())
    return Gradients(*_call(_BACKWARD, signature, packed, {}, dy, dresidual_out, h, weight, mean, rstd))


def _there(signature: Signature) -> tuple[int, ...]:
    """Return 1 in the place of each pointer that the custom call is to fill in."""
    return tuple(int(slot.dtype is not None) for slots in signature for slot in slots)


def _call(name: str, signature: Signature, packed: bytes, aliases: dict[int, int], *operands: Array | None) -> list[Any]:
    # a weight whose gradient is summed over devices is described in the dtype of the sum
    given = [cast(array, slot.dtype) for slot, array in zip(signature.operands, operands, strict=True) if slot.dtype]
    shapes = [jax.ShapeDtypeStruct(slot.shape, numpy_dtype(slot.dtype)) for slot in signature.results if slot.dtype]
    call = jax.ffi.ffi_call(name, shapes, input_output_aliases=aliases)
    return signature.spread(call(*given, call=np.frombuffer(packed, np.int64)))
