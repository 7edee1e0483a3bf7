# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels, started without Triton looking at every argument of every launch.

It does so to find the compiled kernel, which takes many times as long as to start it. Here the plan, the dtypes and the sizes
say the same beforehand, and of a call only its addresses are left to look at. A kernel is compiled by Triton, on what stands in
for arrays, and started as Triton itself would: where its code for that is another than known, or one of its launch hooks is
set, it does that too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import itemgetter, or_
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from normkit.errors import LaunchError
from normkit.failures import could_not, is_short_of_memory, triton_errors
from normkit.plan import Step

from . import device as devices

# an address and an integer are specialised by whether they are multiples of this
_ALIGNMENT = 16
# kernels to keep, and compiled ones of each; what is forgotten is found again by Triton
_MOST = 1024

_compiling = threading.RLock()


class _Compiled(NamedTuple):
    """A kernel that is loaded; without `run` it is for Triton to start. `kernel` holds what would else be unloaded."""

    run: Callable[..., None] | None
    function: object
    metadata: object
    kernel: object


@dataclass(frozen=True, slots=True)  # a tuple would be one of several arguments
class _Pointer:
    """What stands in for an array; Triton takes for one what has a dtype and data_ptr()."""

    dtype: torch.dtype
    address: int
    size: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:  # kernels for AMD are other ones beyond 2 GiB
        return self.size


class Kernel:
    """A kernel on one device, for arrays of given dtypes; compiled for each alignment of them as that comes up.

    Args:
        step: as planned; the kernel is the same for any grid.
        dtypes: of the array behind each pointer argument, by the argument's name, in the order of the addresses; None for one
            that there is not.
        device: where the arrays are, which need not be the current one; the stream is what is current there at each launch.

    Raises:
        LaunchError: Triton cannot be imported, or has no driver.
    """

    def __init__(self, step: Step, dtypes: Mapping[str, torch.dtype | None], device: torch.device) -> None:
        self._kernel, self._device = kernel_of(step), device
        try:
            self._number, self._current_device, self._current_stream = devices.lookups(device)
        except triton_errors() as error:
            raise _failed("find a driver for", step, error) from error
        self._runtime = _runtime_knobs()
        self._step, self._dtypes = step, tuple(dtypes.values())
        self._options = {"num_warps": step.num_warps, "enable_fp_fusion": True}
        names = self._kernel.arg_names
        self._scalars = [name for name in names if name not in dtypes and name not in step.constants]
        absent = [name for name, dtype in dtypes.items() if dtype is None]
        self._constants = (*step.constants.values(), *[None for _ in absent])
        given = {name: place for place, name in enumerate((*dtypes, *self._scalars, *step.constants))}
        given |= {name: len(given) + place for place, name in enumerate(absent)}
        self._in_order = itemgetter(*[given[name] for name in names])
        self._ready: dict[tuple[object, ...], _Compiled] = {}

    def bind(self, grid: tuple[int, ...], scalars: Mapping[str, Any], elements: int) -> Callable[[tuple[int, ...]], None]:
        """Return what launches the kernel on the arrays at given addresses, 0 for what there is not.

        It raises LaunchError if Triton could not compile, load or launch the kernel, torch.OutOfMemoryError for want of memory.

        Args:
            grid: number of programs along each axis.
            scalars: the other run-time arguments, by name.
            elements: from the first to the last one of the array that reaches farthest.
        """
        values = tuple([scalars[name] for name in self._scalars])
        # floats are never specialised; of sizes only whether more bits are needed
        unspecialised = self._kernel.do_not_specialize
        facts: list[object] = [elements >> 29]
        for name, value in zip(self._scalars, values, strict=True):
            if not isinstance(value, float):
                facts.append(_fact(value, name not in unspecialised))
        return partial(self._launch, (*grid, 1, 1)[:3], values, tuple(facts), elements)

    def _launch(
        self,
        grid: tuple[int, ...],
        scalars: tuple[Any, ...],
        facts: tuple[object, ...],
        elements: int,
        addresses: tuple[int, ...],
    ) -> None:
        if self._current_device() != self._number:
            with devices.current(self._device):
                return self._launch(grid, scalars, facts, elements, addresses)
        alignment = tuple([address % _ALIGNMENT > 0 for address in addresses]) if reduce(or_, addresses) % _ALIGNMENT else ()
        found = self._ready.get((facts, alignment))
        if found is None:
            found = self._compile((facts, alignment), self._stand_ins(scalars, elements, addresses))
        if _hooked(self._runtime):  # what a hook raises is its own, and after one that follows the kernel has run
            self._kernel[grid](*self._stand_ins(scalars, elements, addresses), **self._options)
            return None
        try:
            if found.run is None:
                self._kernel[grid](*self._stand_ins(scalars, elements, addresses), **self._options)
            else:
                # the last three are what hooks would be told, and the hooks
                start = (*grid, self._current_stream(self._number), found.function, found.metadata, None, None, None)
                found.run(*start, *self._in_order(addresses + scalars + self._constants))
        except triton_errors() as error:
            raise _failed("launch", self._step, error) from error
        return None

    def _stand_ins(self, scalars: tuple[Any, ...], elements: int, addresses: tuple[int, ...]) -> tuple[Any, ...]:
        given = zip(addresses, self._dtypes, strict=True)
        pointers = [dtype and _Pointer(dtype, address, elements * dtype.itemsize) for address, dtype in given]
        arguments: tuple[Any, ...] = self._in_order((*pointers, *scalars, *self._constants))
        return arguments

    def _compile(self, key: tuple[object, ...], arguments: tuple[Any, ...]) -> _Compiled:
        with _compiling:
            found = self._ready.get(key)
            if found is None:
                try:
                    found = _loaded(self._kernel.warmup(*arguments, grid=(1,), **self._options))
                except triton_errors() as error:
                    raise _failed("compile and load", self._step, error) from error
                if len(self._ready) >= _MOST:
                    self._ready.clear()
                self._ready[key] = found
        return found


def _fact(value: int, specialised: bool) -> object:
    """Return what a kernel may depend on: the bits that an integer needs, and if it is specialised what it is a multiple of."""
    if specialised and 0 <= value <= 1:
        return value
    return value >> 31 if not specialised else (value >> 31, value % _ALIGNMENT)


def kernel_of(step: Step) -> Any:
    """Return the kernel of a step.

    Raises:
        LaunchError: Triton cannot be imported.
    """
    try:
        from normkit import kernels  # not before a launch, so that choosing an implementation never imports triton
    except triton_errors() as error:
        raise _failed("be imported to launch", step, error) from error
    return getattr(kernels, step.kernel)


def is_interpreted(kernel: object) -> bool:
    """Whether Triton interprets a kernel, which then needs the tensors themselves."""
    from triton import JITFunction

    return not isinstance(kernel, JITFunction)


def _loaded(kernel: Any) -> _Compiled:
    from triton.compiler import CompiledKernel

    if not isinstance(kernel, CompiledKernel) or not _starts_as_known():
        return _Compiled(None, None, None, kernel)
    kernel._init_handles()  # this loads it; `run` would not again after a failure
    return _Compiled(kernel.run, kernel.function, kernel.packed_metadata, kernel)


@cache
def _starts_as_known() -> bool:
    """Whether Triton would start a compiled kernel just as it is started here: its own code is run on a stand-in, to see."""
    from triton.compiler import CompiledKernel

    seen: list[tuple[object, ...]] = []
    stand_in: Any = SimpleNamespace(
        run=lambda *given: seen.append(given),
        function="function",
        packed_metadata="metadata",
        launch_metadata=lambda *_: None,
        _init_handles=lambda: None,
    )
    runtime = _runtime_knobs()
    try:
        CompiledKernel.__getitem__(stand_in, (1, 2, 3))("argument", stream="stream")
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    except (AttributeError, TypeError):
        return False
    return seen == [(1, 2, 3, "stream", "function", "metadata", None, *hooks, "argument")]


def _runtime_knobs() -> Any:
    from triton import knobs

    return knobs.runtime


def _hooked(runtime: Any) -> bool:
    """Whether a launch hook of Triton's is set: alone, or in a chain."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _failed(what: str, step: Step, error: Exception) -> Exception:
    """Return what to raise: LaunchError, or where memory was short, which says nothing of other calls, what torch would."""
    short = isinstance(error, torch.OutOfMemoryError) or is_short_of_memory(error)
    return (torch.OutOfMemoryError if short else LaunchError)(could_not(what, step.kernel, error))
