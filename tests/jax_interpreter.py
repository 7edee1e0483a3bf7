# SPDX-License-Identifier: Apache-2.0
"""The Triton interpreter inside jax.jit on the CPU: the kernels as they are, reached by all but the custom call itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from normkit.arrays import numpy_dtype
from normkit.plan import Step

from .cases import NumpyArray

# The interpreter keeps the index of the running program in a global.
_LOCK = threading.Lock()
# What each launch in the programs lowered so far does with its buffers.
_runs: list[Callable[..., None]] = []


def install() -> None:
    """Lower the primitives on the CPU as on cuda, with a call of the interpreter in place of the custom call."""
    from jax.interpreters import mlir

    from normkit_jax import device, launch, partition, primitive

    vars(device)["platform_of"] = lambda _: "cuda"
    vars(device)["arch_of"] = lambda *_: "sm_90"
    vars(launch)["_launch"] = _launch
    for function, operation in (("forward", primitive.forward_p), ("backward", primitive.backward_p)):
        partition.needs_devices(operation)
        mlir.register_lowering(operation, _calling_back(primitive.lowering(function, "cuda")), platform="cpu")


def _calling_back(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a lowering rule that lets the program call `_run_launch`, its only callback, before it lowers as `rule` does.

    For a call inside of custom_partitioning JAX forgets the callback of the part, but not that of the whole program.
    """

    def calling_back(context: Any, *operands: Any, **parameters: Any) -> Any:
        if not context.module_context.host_callbacks:
            context.module_context.add_host_callback(_run_launch)
        return rule(context, *operands, **parameters)

    return calling_back


def _run_launch(_: Any, number: Any, *buffers: Any) -> tuple[()]:
    _runs[np.asarray(number).item()](*buffers)
    return ()


@cache
def _launch_p() -> Any:
    """Return the primitive that runs a launch; its first operand is the launch's number."""
    import jax
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    def abstract(_: Any, *operands: Any, shapes: Any) -> list[Any]:
        return [jax.core.ShapedArray(shape.shape, shape.dtype) for shape in shapes]

    def lower(context: Any, *operands: Any, shapes: Any) -> Any:
        return jax.ffi.ffi_lowering("xla_buffer_python_cpu_callback")(context, *operands, index=np.uint64(0))

    primitive = Primitive("interpret_launch")
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, _calling_back(lower), platform="cpu")
    return primitive


def _launch(
    step: Step,
    arch: str | None,
    arrays: Mapping[str, Any],
    scalars: Mapping[str, float],
    results: Mapping[str, Any],
    overwrites: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    import jax

    from normkit import kernels

    kernel = getattr(kernels, step.kernel)
    pointers = [name.removesuffix("_ptr") for name in kernel.arg_names if name.endswith("_ptr")]
    given = [name for name in pointers if arrays.get(name) is not None]
    made = [name for name in pointers if results.get(name)]
    others = {
        name: scalars.get(name, 0) for name in kernel.arg_names if not name.endswith("_ptr") and name not in step.constants
    }

    def run(*arguments: Any) -> None:
        buffers = dict(zip((*given, *made), arguments, strict=True))
        tensors: dict[str, Any] = {f"{name}_ptr": None for name in pointers}
        tensors |= {f"{name}_ptr": Tensor(np.asarray(buffer)) for name, buffer in buffers.items()}
        with _LOCK:
            kernel[step.grid](**tensors, **others, **step.constants)

    _runs.append(run)
    shapes = tuple(jax.ShapeDtypeStruct(results[name][0], numpy_dtype(results[name][1])) for name in made)
    number = np.int32(len(_runs) - 1)
    computed = _launch_p().bind(number, *(arrays[name] for name in given), shapes=shapes)
    return dict(zip(made, computed, strict=True))


class Tensor:
    """A NumPy array with as much of a torch tensor's interface as the interpreter asks for; nothing is copied."""

    def __init__(self, array: NumpyArray) -> None:
        self._array = array
        self.dtype = array.dtype.name
        self.shape = array.shape

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def untyped_storage(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def copy_(self, _: Tensor) -> Tensor:
        return self

    def new_empty(self, *_: Any, **__: Any) -> Tensor:
        return self

    def set_(self, *_: Any) -> Tensor:
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def element_size(self) -> int:
        return self._array.itemsize

    def numel(self) -> int:
        return self._array.size
