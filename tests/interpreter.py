# SPDX-License-Identifier: Apache-2.0
"""The Triton interpreter as a test device: CPU tensors run the kernels as they are, on a platform that says it is cuda.

`watch` sees every element that a kernel reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

Counts = np.ndarray[Any, np.dtype[np.int32]]
_SEVERAL = -1


def install() -> None:
    """Say that CPU tensors are on cuda, at the one place that detects it, and let the interpreter round as hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter

    if find_spec("torch"):
        from normkit_torch import device

        vars(device)["platform_of"] = lambda _: ("cuda", "sm_90")
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        # the interpreter truncates here, hardware rounds to nearest even
        if source == tl.float32 and target == tl.bfloat16:
            rounded = np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)
            return rounded.view(np.uint16).reshape(values.shape)
        return original(values, source, target, mode)

    interpreter._convert_float = convert


class MemoryFault(AssertionError):
    """A kernel read or wrote what it must not."""


class _Shadow:
    """What happened to each element of one storage: which arguments it belongs to, how often and by whom it was accessed."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.names = list(tensors)
        first = next(iter(tensors.values()))
        self.item = first.element_size()
        if any(tensor.dtype != first.dtype for tensor in tensors.values()):
            raise MemoryFault(f"{', '.join(tensors)} share memory and differ in dtype")
        self.start = min(tensor.data_ptr() for tensor in tensors.values())
        self.end = max(tensor.data_ptr() + self.item * (1 + _last(tensor)) for tensor in tensors.values())
        size = (self.end - self.start) // self.item
        self.owners, self.reads, self.writes, self.reader, self.writer = (np.zeros(size, np.int32) for _ in range(5))
        for bit, tensor in enumerate(tensors.values()):
            self.of(self.owners, tensor)[...] |= 1 << bit

    def of(self, counts: Counts, tensor: Any) -> Counts:
        """Return what was counted for the elements of a tensor, in its shape."""
        first = (tensor.data_ptr() - self.start) // self.item
        strides = [stride * counts.itemsize for stride in tensor.stride()]
        return np.lib.stride_tricks.as_strided(counts[first:], tuple(tensor.shape), strides)

    def access(self, kind: str, addresses: Any, program: int) -> None:
        """Record that a program reads or writes these addresses at once."""
        if int(addresses.max()) + self.item > self.end:
            raise MemoryFault(f"{kind} of an element beyond the end of {', '.join(self.names)}")
        index = ((addresses - np.uint64(self.start)) // np.uint64(self.item)).astype(np.int64)
        if not np.bitwise_and.reduce(self.owners[index]):
            raise MemoryFault(f"{kind} of elements that are not of one argument, near {', '.join(self.names)}")
        mine, others = (self.reader, self.writer) if kind == "load" else (self.writer, self.reader)
        if not _nobody_or(program, others[index]).all():
            raise MemoryFault(f"race: one program reads and another writes an element of {', '.join(self.names)}")
        if kind == "load":
            np.add.at(self.reads, index, 1)
            mine[index] = np.where(_nobody_or(program, mine[index]), program, _SEVERAL)
            return
        np.add.at(self.writes, index, 1)
        if (self.writes[index] > 1).any():
            by = "two programs" if not _nobody_or(program, mine[index]).all() else "a program"
            raise MemoryFault(f"race: {by} wrote an element of {', '.join(self.names)} twice")
        mine[index] = program


class Launch:
    """One kernel launch: its arguments by name (without "_ptr"), and how often each element of a tensor was accessed."""

    def __init__(self, step: Any, arguments: Mapping[str, Any]) -> None:
        self.step, self.kernel, self.grid = step, step.kernel, step.grid
        self.arguments = {name.removesuffix("_ptr"): value for name, value in arguments.items()}
        self.tensors = {name: value for name, value in self.arguments.items() if hasattr(value, "data_ptr")}
        storages: dict[int, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            if tensor.numel():
                storages.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        self._shadows = [_Shadow(tensors) for tensors in storages.values()]

    def access(self, kind: str, addresses: Any, program: int) -> None:
        """Record an access, to the argument's memory that it starts in."""
        lowest = int(addresses.min())
        for shadow in self._shadows:
            if shadow.start <= lowest < shadow.end:
                return shadow.access(kind, addresses, program)
        raise MemoryFault(f"{kind} outside every argument of {self.kernel}")

    def reads(self, name: str) -> Counts:
        """How often each element was read, in the tensor's shape."""
        return self._counts(name, "reads")

    def writes(self, name: str) -> Counts:
        """How often each element was written, in the tensor's shape."""
        return self._counts(name, "writes")

    def unwritten(self, name: str) -> list[tuple[int, ...]]:
        """The indices of the elements that were never written."""
        return [tuple(map(int, index)) for index in np.argwhere(self.writes(name) == 0)]

    def _counts(self, name: str, which: str) -> Counts:
        for shadow in self._shadows:
            if name in shadow.names:
                return shadow.of(getattr(shadow, which), self.tensors[name])
        return np.zeros(tuple(self.tensors[name].shape), np.int32)


@contextmanager
def watch() -> Iterator[list[Launch]]:
    """Watch all launches meanwhile; a MemoryFault is raised at the first access that is wrong."""
    from triton.runtime import interpreter

    from normkit import kernels
    from normkit_torch import steps

    launches: list[Launch] = []
    original, builder = steps.launch, interpreter.InterpreterBuilder

    def watched_launch(step: Any, arguments: Mapping[str, object]) -> None:
        names = getattr(kernels, step.kernel).arg_names
        launches.append(Launch(step, {name: arguments[name] for name in names if name in arguments}))
        try:
            original(step, arguments)
        except interpreter.InterpreterError as error:
            raise error.__cause__ or error from None

    def watched(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[1] if kind == "store" else rest[0]
            addresses = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)]
            if addresses.size:
                (x, y, z), (across, down, _) = self.grid_idx, self.grid_dim
                launches[-1].access(kind, addresses.ravel(), 1 + x + across * (y + down * z))
            return method(self, pointers, *rest)

        return access

    def refused(*_: Any) -> None:
        raise MemoryFault("an atomic operation, whose order is not the same in every run")

    with ExitStack() as stack:
        stack.enter_context(patch.object(steps, "launch", watched_launch))
        for kind in ("load", "store"):
            name = f"create_masked_{kind}"
            stack.enter_context(patch.object(builder, name, watched(kind, getattr(builder, name))))
        for name in [name for name in dir(builder) if name.startswith("create_atomic")]:
            stack.enter_context(patch.object(builder, name, refused))
        yield launches


def _last(tensor: Any) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _nobody_or(program: int, programs: Counts) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return (programs == 0) | (programs == program)
