# SPDX-License-Identifier: Apache-2.0
"""What it costs to reach a vendor's operator from JAX, next to calling the same operator from torch, on the CPU.

    python -m benchmarks.exchange --output benchmarks/results/exchange_vllm.csv

Runs in an environment with one vendor's package; see tests/vendors/make_env.sh. The results are compared before anything is
timed; then all ways are timed in turn, as `normkit bench` does.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import normkit_jax
import normkit_torch
from normkit.bench.measure import by_clock, interleaved
from normkit.spec import NormSpec
from normkit.vendors.exchange import Given

try:
    from tests.vendors.vendor import MODULE, NAME
except pytest.skip.Exception:
    raise SystemExit("benchmarks.exchange needs vLLM or IPEX: run it in an environment of tests/vendors/make_env.sh") from None

SHAPE = (16, 4096)


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
        "operator": lambda: MODULE.compute(spec, given, None),
        "normkit_torch": lambda: normkit_torch.add_rms_norm(*tensors, implementation=NAME),
        "normkit_jax, jit": lambda: _ready(compiled(*arrays)),
        "normkit_jax, jit, reference": lambda: _ready(plain(*arrays)),
    }


def _ready(results: Any) -> Any:
    # jax.block_until_ready looks for arrays in any tree, which takes some microseconds
    for result in results:
        result.block_until_ready()
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="what it costs to reach a vendor's operator from JAX")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way, about")
    options = parser.parse_args(arguments)
    functions = ways(SHAPE)
    expected = [np.asarray(result) for result in functions["normkit_jax, jit, reference"]()]
    for name, function in functions.items():
        for result, value in zip(function(), expected, strict=True):
            array = result.numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
            np.testing.assert_allclose(array, value, rtol=1e-5, atol=1e-5, err_msg=name)
    blocks = {name: by_clock(partial(_again, function)) for name, function in functions.items()}
    measured = interleaved(blocks, options.seconds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("vendor", "rows", "hidden_size", "way", "us_p20", "us_median", "us_p80", "torch", "jax"))
        for name, (*quantiles, _) in measured.items():
            low, median, high = (f"{1e6 * seconds:.1f}" for seconds in quantiles)
            writer.writerow((NAME, *SHAPE, name, low, median, high, torch.__version__, jax.__version__))
            print(f"{name:<28} {median:>8} us  ({low} to {high})")


def _again(function: Callable[[], Any], index: int) -> Callable[[], Any]:
    return function


if __name__ == "__main__":
    main()
