# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels, started without Triton looking at every argument of every launch.

It does so to find the compiled kernel, which takes many times as long as to start it. Here the plan, the dtypes and the sizes
say the same beforehand, and of a call only its addresses are left to look at. A kernel is compiled by Triton, on what stands in
for arrays, and started as Triton itself would: where its code for that is another than known, or one of its launch hooks is
set, it does that too.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from operator import itemgetter, or_
from textwrap import shorten
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from normkit.errors import LaunchError
from normkit.plan import Step

from . import device as devices

Start = Callable[[tuple[int, ...]], None]
"""Launches a step on the arrays at these addresses, 0 for what there is not."""

# Triton knows of an address, and of an integer, whether it is a multiple of this
_ALIGNMENT = 16
# kernels to keep; those forgotten are still compiled
_MOST = 4096

_compiled: dict[tuple[object, ...], _Compiled] = {}
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


def prepare(
    step: Step, dtypes: Mapping[str, torch.dtype | None], scalars: Mapping[str, Any], elements: int, device: torch.device
) -> Start:
    """Return what launches a step.

    Args:
        step: as planned.
        dtypes: of the array behind each pointer argument, by the argument's name, in the order of the addresses; None for one
            that there is not.
        scalars: the other run-time arguments, by name.
        elements: of the largest array.
        device: where the arrays are, which need not be the current one; the stream is what is current there at each launch.

    Raises:
        LaunchError: Triton could not be loaded, or has no driver; and each launch, if it could not compile or start the kernel.
    """
    kernel = kernel_of(step)
    try:
        number, current_device, current_stream = devices.lookups(device)
    except _failures() as error:
        raise _failed("find a driver for", step, error) from error
    runtime = _runtime_knobs()
    given = {**dict.fromkeys(dtypes), **scalars, **step.constants}
    values = tuple([given[name] for name in kernel.arg_names])
    places = {name: place for place, (name, dtype) in enumerate(dtypes.items()) if dtype is not None}
    pick = itemgetter(*[places.get(name, index) for index, name in enumerate(kernel.arg_names, len(dtypes))])
    grid = (*step.grid, 1, 1)[:3]
    key = (number, step.kernel, step.num_warps, elements >> 29, *dtypes.values(), *_specialised(kernel, values))
    options = {"num_warps": step.num_warps, "enable_fp_fusion": True}
    ready: dict[tuple[bool, ...], _Compiled] = {}

    def stand_ins(addresses: tuple[int, ...]) -> Any:
        given = zip(addresses, dtypes.values(), strict=True)
        return pick((*[dtype and _Pointer(dtype, address, elements * dtype.itemsize) for address, dtype in given], *values))

    def find(addresses: tuple[int, ...], alignment: tuple[bool, ...]) -> _Compiled:
        with _compiling:
            found = _compiled.get((key, alignment))
            if found is None:
                try:
                    found = _loaded(kernel.warmup(*stand_ins(addresses), grid=grid, **options))
                except _failures() as error:
                    raise _failed("compile and load", step, error) from error
                if len(_compiled) >= _MOST:
                    _compiled.clear()
                _compiled[key, alignment] = found
        ready[alignment] = found
        return found

    def launch(addresses: tuple[int, ...]) -> None:
        alignment = tuple([address % _ALIGNMENT > 0 for address in addresses]) if reduce(or_, addresses) % _ALIGNMENT else ()
        found = ready.get(alignment) or find(addresses, alignment)
        if _hooked(runtime):  # what a hook raises is its own, and after one that follows the kernel has run
            kernel[grid](*stand_ins(addresses), **options)
            return
        try:
            if found.run is None:
                kernel[grid](*stand_ins(addresses), **options)
            else:
                # the last three: what hooks would be told, and the hooks
                start = (*grid, current_stream(number), found.function, found.metadata, None, None, None)
                found.run(*start, *pick(addresses + values))
        except _failures() as error:
            raise _failed("launch", step, error) from error

    def on_the_device(addresses: tuple[int, ...]) -> None:
        if current_device() == number:
            launch(addresses)
        else:
            with devices.current(device):
                launch(addresses)

    return on_the_device


def kernel_of(step: Step) -> Any:
    """Return the kernel of a step.

    Raises:
        LaunchError: Triton cannot be imported.
    """
    try:
        from normkit import kernels  # not before a launch, so that choosing an implementation never imports triton
    except _failures() as error:
        raise _failed("be imported for", step, error) from error
    return getattr(kernels, step.kernel)


def is_interpreted(kernel: object) -> bool:
    """Whether Triton interprets a kernel, which then needs the tensors themselves."""
    from triton import JITFunction

    return not isinstance(kernel, JITFunction)


def _specialised(kernel: Any, values: tuple[Any, ...]) -> list[object]:
    """Return what Triton may specialise a kernel by besides pointers: of a float nothing, of a number of rows its width."""
    unspecialised = kernel.do_not_specialize
    return [
        value >> 31 if name in unspecialised else value
        for name, value in zip(kernel.arg_names, values, strict=True)
        if not isinstance(value, float)
    ]


def _loaded(kernel: Any) -> _Compiled:
    from triton.compiler import CompiledKernel

    if not isinstance(kernel, CompiledKernel) or not _starts_as_known():
        return _Compiled(None, None, None, kernel)
    run = kernel.run  # this loads it
    return _Compiled(run, kernel.function, kernel.packed_metadata, kernel)


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


def _failures() -> tuple[type[Exception], ...]:
    """Return the errors with which Triton, its compilers and the driver fail; they are not those of a wrong call."""
    failures = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return failures
    return *failures, TritonError


def _failed(what: str, step: Step, error: Exception) -> LaunchError:
    return LaunchError(f"Triton could not {what} {step.kernel}: {type(error).__name__}: {shorten(str(error), 300)}")
