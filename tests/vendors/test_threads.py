# SPDX-License-Identifier: Apache-2.0
"""Many threads at once, from torch and from JAX: no deadlock, no wrong result, no memory that grows."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import normkit_jax
import normkit_torch

from .vendor import NAME, rows

THREADS = 8
SECONDS = float(os.environ.get("NORMKIT_STRESS_SECONDS", "60"))
# What allocators and thread pools may still take after the first quarter. A leak of one array a call would be 100 times that.
GROWTH = 64 * 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def to_numpy(array: Any) -> Any:
    return array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def test_eight_threads_for_a_minute() -> None:
    arrays = rows(64, 512), rows(64, 512, seed=1), rows(512, seed=2)
    tensors = [torch.from_numpy(array) for array in arrays]
    buffers = [jnp.asarray(array) for array in arrays]
    in_torch: Any = partial(normkit_torch.add_rms_norm, *tensors, implementation=NAME)
    compiled = jax.jit(partial(normkit_jax.add_rms_norm, implementation=NAME))

    def in_jax() -> Any:
        return jax.block_until_ready(compiled(*buffers))

    expected = [to_numpy(result) for result in in_torch()]
    calls = [0] * THREADS
    stop = time.monotonic() + SECONDS
    settled: list[int] = []
    started = threading.Barrier(THREADS)

    def work(index: int) -> None:
        started.wait()
        while time.monotonic() < stop:
            results = (in_torch if index % 2 else in_jax)()
            calls[index] += 1
            if calls[index] % 16 == 1:
                for result, value in zip(results, expected, strict=True):
                    np.testing.assert_allclose(to_numpy(result), value, rtol=1e-6, atol=1e-6)
            if index == 0 and not settled and time.monotonic() > stop - 0.75 * SECONDS:
                settled.append(resident())

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(work, index) for index in range(THREADS)]:
            future.result(timeout=SECONDS + 120)
    grown = resident() - settled[0]
    print(f"{sum(calls)} calls, {min(calls)} at least in each thread; resident memory grew by {grown / 2**20:.1f} MiB")
    assert min(calls) > 10
    assert grown < GROWTH
