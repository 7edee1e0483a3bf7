# SPDX-License-Identifier: Apache-2.0
"""normkit in JAX on a GPU, against XLA's fusion of the same expression, jax.nn, flax and tokamax: first verified, then timed.

    python -m benchmarks.jax_gpu --output benchmarks/results/jax_gpu.csv

Every competitor computes the same residual add and norm, compiled by jax.jit, forward alone and with all gradients. One byte
model serves all of them: the arrays that have to be read and written, whatever a competitor reads and writes beside. They run
in turn, one call after another on buffers that rotate, so that nothing is found in a cache; times are medians of samples that
wait for the device, with the 20th and the 80th percentile, and stand beside the bandwidth of a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normkit_jax
from normkit.bench.traffic import moved_bytes
from normkit.bench.verify import verified_rows
from normkit.tolerance import expected_backward, expected_forward, worst
from tests.cases import Case, tagged

Function = Callable[..., Any]
# More than the largest cache of a GPU, so that a buffer is out of it when its turn comes again.
ROTATED_BYTES = 512 * 2**20
OPERANDS = ("x", "residual", "weight", "bias")
PACKAGES = ("jax", "jaxlib", "triton", "flax", "tokamax")
COLUMNS: tuple[str, ...] = ("case", "rows", "hidden_size", "x_dtype", "mode", "implementation", "worst_error")
COLUMNS += ("us_p20", "us_median", "us_p80", "gb_per_s", "percent_of_copy", *PACKAGES, "device", "commit", "date")


def competitors(case: Case) -> dict[str, Function]:
    """Return by name the functions of x, residual, weight and bias that compute a case, of which some may be None."""
    found: dict[str, Function] = {"normkit": partial(_normkit, case), "xla": partial(_alone, case, _xla)}
    if case.kind == "layer":
        found["jax.nn"] = partial(_alone, case, _jax_nn)
    if find_spec("flax"):
        found["flax"] = partial(_alone, case, _flax)
    if find_spec("tokamax"):
        found["tokamax"] = partial(_alone, case, _tokamax)
    return found


def _normkit(case: Case, x: Any, residual: Any, weight: Any, bias: Any) -> Any:
    operands = [x, residual, weight, bias] if case.function.startswith("add_") else [x, weight, bias]
    result = getattr(normkit_jax, case.function)(*operands, **case.options)
    return result if isinstance(result, tuple) else (result, None)


def _alone(case: Case, norm: Function, x: Any, residual: Any, weight: Any, bias: Any) -> Any:
    """Add the residual in plain JAX, which XLA is free to fuse with the norm."""
    h = x if residual is None else (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(residual.dtype)
    y = norm(case, h, weight, bias).astype(case.problem().out_dtype)
    return y, None if residual is None else h


def _xla(case: Case, h: Any, weight: Any, bias: Any) -> Any:
    h = h.astype(jnp.float32)
    if case.kind == "layer":
        h = h - h.mean(-1, keepdims=True)
    y = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + case.eps)
    return _weighted(case, y, weight, bias)


def _jax_nn(case: Case, h: Any, weight: Any, bias: Any) -> Any:
    return _weighted(case, jax.nn.standardize(h.astype(jnp.float32), epsilon=case.eps), weight, bias)


def _weighted(case: Case, y: Any, weight: Any, bias: Any) -> Any:
    y = y if weight is None else y * (case.weight_offset + weight.astype(jnp.float32))
    return y if bias is None else y + bias.astype(jnp.float32)


def _flax(case: Case, h: Any, weight: Any, bias: Any) -> Any:
    from flax import linen

    parameters = {} if weight is None else {"scale": case.weight_offset + weight}
    if case.kind == "rms":
        layer: Any = linen.RMSNorm(epsilon=case.eps, use_scale=weight is not None, dtype=h.dtype)
    else:
        parameters |= {} if bias is None else {"bias": bias}
        layer = linen.LayerNorm(epsilon=case.eps, use_scale=weight is not None, use_bias=bias is not None, dtype=h.dtype)
    return layer.apply({"params": parameters}, h)


def _tokamax(case: Case, h: Any, weight: Any, bias: Any) -> Any:
    tokamax = import_module("tokamax")

    options = {"epsilon": case.eps, "scale_offset": case.weight_offset, "subtract_mean": case.kind == "layer"}
    return tokamax.layer_norm(h, weight, bias, **options)


def modes(function: Function) -> dict[str, Function]:
    """Return by name the compiled programs that are timed: of the operands, then dy and dresidual_out."""

    def forward(*arrays: Any) -> Any:
        return function(*arrays[:4])

    def forward_and_backward(*arrays: Any) -> Any:
        results, vjp = jax.vjp(function, *arrays[:4])
        return *results, *vjp(arrays[4:])

    return {"forward": jax.jit(forward), "forward-and-backward": jax.jit(forward_and_backward)}


def buffers(case: Case, rotated_bytes: int) -> list[list[Any]]:
    """Return sets of arrays, as many as fill the bytes that are rotated: operands, then dy and dresidual_out."""
    problem, dtypes = case.problem(), {"x": case.x, "residual": case.residual, "weight": case.weight, "bias": case.bias}
    dtypes |= {"dy": problem.out_dtype, "dresidual_out": problem.residual_out_dtype}
    count = max(1, min(64, -(-rotated_bytes // moved_bytes(case.problem(), "forward"))))

    def make(key: Any, name: str, dtype: str | None) -> Any:
        shape = case.shape[-1:] if name in ("weight", "bias") else case.shape
        mean = 1.0 if name == "weight" and not case.weight_offset else 0.0
        return None if dtype is None else (mean + jax.random.normal(key, shape)).astype(dtype)

    keys = jax.random.split(jax.random.key(0), (count, len(dtypes)))
    return [[make(key, *item) for key, item in zip(row, dtypes.items(), strict=True)] for row in keys]


def sparse(case: Case, arrays: list[Any]) -> list[Any]:
    """Return the arrays with a dy that is zero but in the verified rows, so that dweight and dbias are sums over these."""
    *others, dy, dresidual_out = arrays
    chosen = np.zeros((case.problem().rows, 1), bool)
    chosen[verified_rows(case.problem().rows, case.shape[-1])] = True
    return [*others, jnp.where(chosen.reshape(*case.shape[:-1], 1), dy, 0).astype(dy.dtype), dresidual_out]


def worst_error(case: Case, mode: str, arrays: list[Any], results: Any) -> float:
    """Return the largest error in units of its bound, of the rows that have a dy and of the sums over them."""
    chosen = verified_rows(case.problem().rows, case.shape[-1])
    few = replace(case, shape=(len(chosen), case.shape[-1]))

    def rows(array: Any) -> Any:
        if array is None or array.ndim == 1:
            return None if array is None else np.asarray(array)
        return np.asarray(array.reshape(-1, case.shape[-1])[chosen])

    given = [rows(array) for array in arrays]
    y, residual_out, *gradients = [rows(array) for array in results]
    expected = dict(
        zip(("y", "residual_out"), expected_forward(few.problem(), *given[:4], residual_out=residual_out), strict=True)
    )
    actual = {"y": y, "residual_out": residual_out}
    if mode == "forward-and-backward":
        h = given[0] if residual_out is None else residual_out
        expected |= expected_backward(few.problem(), given[4], given[5], h, given[2])
        actual |= dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients, strict=True))
    return max(worst(array, expected[name]) for name, array in actual.items() if array is not None)


def sample(program: Function, sets: list[list[Any]], calls: int) -> float:
    """Return the seconds of one call, from so many one after another."""
    start = time.perf_counter()
    last = [program(*sets[index % len(sets)]) for index in range(calls)][-1]
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / calls


def measure(case: Case, samples: int, rotated_bytes: int) -> Iterator[dict[str, Any]]:
    """Verify and time all competitors on a case, and the copy of as many bytes."""
    sets = buffers(case, rotated_bytes)
    programs = {name: modes(function) for name, function in competitors(case).items()}
    for mode in ("forward", "forward-and-backward"):
        total = moved_bytes(case.problem(), mode)
        copies = [
            [jnp.ones(max(1, total // 8), jnp.float32) * index] for index in range(max(1, min(64, rotated_bytes // total)))
        ]
        contest: dict[str, tuple[Function, list[list[Any]]]] = {"copy": (jax.jit(jnp.copy), copies)}
        contest |= {name: (program[mode], sets) for name, program in programs.items()}
        given = sparse(case, sets[0])
        errors = {name: worst_error(case, mode, given, contest[name][0](*given)) for name in programs}
        if errors["normkit"] > 1:
            raise AssertionError(f"normkit is wrong on {case.name}, {mode}: {errors['normkit']} times the bound")
        seconds: dict[str, list[float]] = {name: [] for name in contest}
        calls = {name: max(1, min(len(of), 32)) for name, (_, of) in contest.items()}
        for name, (program, of) in contest.items():
            sample(program, of, calls[name])
        for _ in range(samples):
            for name, (program, of) in contest.items():
                seconds[name].append(sample(program, of, calls[name]))
        copy = total / float(np.median(seconds["copy"]))
        for name, times in seconds.items():
            p20, median, p80 = (float(value) for value in np.percentile(times, (20, 50, 80)))
            yield {
                "case": case.name,
                "rows": case.problem().rows,
                "hidden_size": case.shape[-1],
                "x_dtype": case.x,
                "mode": mode,
                "implementation": name,
                "worst_error": f"{errors[name]:.3f}" if name in errors else "",
                "us_p20": f"{p20 * 1e6:.2f}",
                "us_median": f"{median * 1e6:.2f}",
                "us_p80": f"{p80 * 1e6:.2f}",
                "gb_per_s": f"{total / median / 1e9:.1f}",
                "percent_of_copy": f"{100 * total / median / copy:.1f}",
            }


def circumstances() -> dict[str, str]:
    """Return versions, device, commit and date."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return found | {"device": jax.devices()[0].device_kind, "commit": git.stdout.strip() or "unknown", "date": date}


def tiny(case: Case) -> Case:
    """Return a case of a few short rows, to run through everything on a CPU."""
    return replace(case, shape=(*(2 for _ in case.shape[:-1]), min(case.shape[-1], 128)))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="normkit in JAX on a GPU against its peers")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--cases", nargs="*", help="names from tests/cases.py; by default all that are tagged bench")
    parser.add_argument("--samples", type=int, default=50, help="samples of each competitor")
    parser.add_argument("--tiny", action="store_true", help="short rows, for a test of this program; such times mean nothing")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu" and not options.tiny:
        parser.error(f"this is for a GPU, and JAX runs on {jax.default_backend()}")
    cases = [case for case in tagged("bench") if options.cases is None or case.name in options.cases]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in map(tiny, cases) if options.tiny else cases:
            for row in measure(case, options.samples, 2**16 if options.tiny else ROTATED_BYTES):
                writer.writerow(row | circumstances())
                print(*(row[column] for column in COLUMNS if column in row), sep="\t", flush=True)


if __name__ == "__main__":
    main()
