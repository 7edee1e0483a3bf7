# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA GPU as the device of contests, and a stand-in for it on the processor, to try all but the GPU itself.

What only a GPU can do, which is events and graphs, is reached through one object: torch.cuda, or the stand-in.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from ..errors import OptionError, UnsupportedError
from .contest import Arrays, Contest
from .device import Device
from .measure import Block, Ready, by_clock

CALLS_IN_A_GRAPH = 16
"""More, and the residual, which grows with each call in place, would have to be given its values again within the graph."""

_ROOM = 12
"""Memory that a contest needs, in units of the bytes that it moves, at most: two sets of arrays (2), the contestants' clones of
them (2), the copy's buffers (2), the arrays and results of a verification (2), and what others allocate in float32 (4)."""

Cuda = Any
"""torch.cuda, or what stands in for it."""


def cuda() -> Device:
    """Return the GPU that is torch's current one.

    Raises:
        UnsupportedError: torch is not there, or sees none.
    """
    if not find_spec("torch"):
        raise UnsupportedError("--device cuda needs torch, which is not installed: pip install torch")
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(f"--device cuda: torch {torch.__version__} sees no CUDA device; --tiny tries all but the GPU")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {
        "device": properties.name,
        "cuda": str(torch.version.cuda),
        "multiprocessors": str(properties.multi_processor_count),
    }
    return device_of(torch.cuda, "cuda", properties.L2_cache_size, facts)


def stand_in() -> Device:
    """Return the processor in the place of a GPU, with a cache so small that nothing fits; its times mean nothing.

    Raises:
        UnsupportedError: torch is not there.
    """
    if not find_spec("torch"):
        raise UnsupportedError("--device cuda --tiny needs torch, which is not installed: pip install torch")
    return device_of(StandIn(), "cpu", 1024, {"device": "none: --tiny"})


def device_of(cuda: Cuda, place: str, cache_bytes: int, facts: dict[str, str]) -> Device:
    """Return the device of torch.cuda or of what stands in for it, with arrays in a place that torch names so."""
    clocks = {"device": by_events, "graph": by_graph, "host": by_launch}
    bound = {name: partial(clock, cuda) for name, clock in clocks.items()}
    return Device("cuda", cache_bytes, partial(arrays, place), bound, facts, partial(check_room, cuda))


def arrays(device: str, contest: Contest, seed: int) -> Arrays:
    """Return normally distributed tensors, made on a device of torch."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, contest.dtype)

    def normal(shape: tuple[int, ...], mean: float = 0.0, scale: float = 1.0) -> Any:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale).add_(mean)

    return contest.filled(normal)


def check_room(cuda: Cuda, contest: Contest) -> None:
    """Refuse a contest that needs more memory than is free.

    Raises:
        OptionError: it does.
    """
    gc.collect()
    cuda.empty_cache()
    needed, (free, _) = _ROOM * contest.moved_bytes, cuda.mem_get_info()
    if needed > free:
        raise OptionError(
            f"{contest} may need {needed / 2**30:.0f} GiB, {_ROOM} times what it moves, and the GPU has {free / 2**30:.0f} GiB "
            "free: pass --cases with fewer rows"
        )


def by_events(cuda: Cuda, ready: Ready) -> Block:
    """Time calls by events before and after each; the processor runs ahead, and waits once for all of them."""

    def block(count: int) -> list[float]:
        pairs = []
        for index in range(count):
            call = ready(index)
            pairs.append((cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)))
            pairs[-1][0].record()
            call()
            pairs[-1][1].record()
        cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    return block


def by_graph(cuda: Cuda, ready: Ready) -> Block:
    """Time calls within replays of one CUDA graph of several: what they take where launching costs next to nothing."""
    calls = [ready(index) for index in range(CALLS_IN_A_GRAPH)]
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for call in calls:
            call()

    def replay(index: int) -> Callable[[], Any]:
        ready(index * CALLS_IN_A_GRAPH)  # which gives what was overwritten its values again when it is time to
        return graph.replay

    replays = by_events(cuda, replay)
    return lambda count: [seconds / CALLS_IN_A_GRAPH for seconds in replays(count)]


def by_launch(cuda: Cuda, ready: Ready) -> Block:
    """Time on the processor what it takes to launch calls, with nothing in the GPU's queue before the first."""
    launches = by_clock(ready)

    def block(count: int) -> list[float]:
        cuda.synchronize()
        times = launches(count)
        cuda.synchronize()
        return times

    return block


class StandIn:
    """What is used of torch.cuda, on the processor: events have its time, and a graph that was captured runs nothing again."""

    class Event:
        """A moment."""

        def __init__(self, enable_timing: bool) -> None:
            self._seconds = 0.0

        def record(self) -> None:
            """Take the time."""
            self._seconds = time.perf_counter()

        def elapsed_time(self, end: StandIn.Event) -> float:
            """Return the milliseconds to another event."""
            return 1e3 * (end._seconds - self._seconds)

    class CUDAGraph:
        """A graph of nothing."""

        def replay(self) -> None:
            """Do nothing."""

    @contextmanager
    def graph(self, graph: CUDAGraph) -> Iterator[None]:
        """Run at once what would be captured."""
        yield

    def synchronize(self) -> None:
        """Wait for nothing."""

    def empty_cache(self) -> None:
        """Keep nothing."""

    def mem_get_info(self) -> tuple[int, int]:
        """Return free and total memory, enough for what is tiny."""
        return 2**30, 2**30
