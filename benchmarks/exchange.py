# SPDX-License-Identifier: Apache-2.0
"""What it costs to reach a vendor's operator from JAX, next to calling the same operator from torch, on the CPU.

    python -m benchmarks.exchange --output benchmarks/results/exchange_vllm.csv

Runs in an environment with one vendor's package; see tests/vendors/make_env.sh. The results are compared before anything is
timed; then all ways are timed in turn, in blocks of calls, because each framework has threads of its own, which have to wake.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import normkit_jax
import normkit_torch
from normkit.spec import NormSpec
from normkit.vendors.exchange import Given
from tests.vendors.vendor import MODULE, NAME

SHAPE = (16, 4096)
BLOCK = 50


def ways(shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Return by name what is timed: add_rms_norm of the same values."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(each, np.float32)) for each in (shape, shape, shape[1:])]
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    assert not MODULE.found().problem, MODULE.found().problem
    spec, given = NormSpec("rms", eps=1e-6), Given(tensors[0], tensors[1], tensors[2], None)
    compiled = jax.jit(partial(normkit_jax.add_rms_norm, implementation=NAME))
    plain = jax.jit(partial(normkit_jax.add_rms_norm, implementation="reference"))
    return {
        "operator": lambda: MODULE._compute(spec, given, None),
        "normkit_torch": lambda: normkit_torch.add_rms_norm(*tensors, implementation=NAME),
        "normkit_jax, jit": lambda: jax.block_until_ready(compiled(*arrays)),
        "normkit_jax, jit, reference": lambda: jax.block_until_ready(plain(*arrays)),
    }


def measure(functions: dict[str, Callable[[], Any]], calls: int) -> dict[str, tuple[float, float, float]]:
    """Return the 20th, 50th and 80th percentile of the microseconds of a call, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for block in range(calls // BLOCK + 1):
        for name, function in functions.items():
            for index in range(BLOCK):
                start = time.perf_counter()
                function()
                # the first block, and the first calls of each, are for warming up
                if block and index >= BLOCK // 5:
                    seconds[name].append(time.perf_counter() - start)
    return {name: tuple(1e6 * np.percentile(times, (20, 50, 80))) for name, times in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="what it costs to reach a vendor's operator from JAX")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--calls", type=int, default=2000, help="of each way")
    options = parser.parse_args(arguments)
    functions = ways(SHAPE)
    expected = [np.asarray(result) for result in functions["normkit_jax, jit, reference"]()]
    for name, function in functions.items():
        for result, value in zip(function(), expected, strict=True):
            array = result.numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
            np.testing.assert_allclose(array, value, rtol=1e-5, atol=1e-5, err_msg=name)
    measured = measure(functions, options.calls)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("vendor", "rows", "hidden_size", "way", "us_p20", "us_median", "us_p80", "torch", "jax"))
        for name, (low, median, high) in measured.items():
            times = (f"{low:.1f}", f"{median:.1f}", f"{high:.1f}")
            writer.writerow((NAME, *SHAPE, name, *times, torch.__version__, jax.__version__))
            print(f"{name:<28} {median:8.1f} us  ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
