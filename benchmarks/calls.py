# SPDX-License-Identifier: Apache-2.0
"""Calls every Triton kernel in every form, forward, backward, in place and strided, and verifies what it computes.

    compute-sanitizer --tool memcheck python -m benchmarks.calls
    python -m benchmarks.calls --large

The first is for tools that make a program very slow: a few small calls, on arrays that are copied to the GPU, so that no other
kernel writes what these read. The second is rows of more than 2^31 elements together, made on the GPU.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from normkit import kernels
from normkit.bench import gpu, with_torch
from normkit.bench.contest import Case as Shape
from normkit.bench.contest import Contest
from normkit.bench.verify import expectations, sparse, spoil, worst_error
from normkit.tolerance import expected_backward, expected_forward, worst
from normkit_torch import launch, launch_backward, steps
from tests.cases import CASES, Case
from tests.frameworks import Torch

NAMES: tuple[str, ...] = (
    "llama_3_8b",
    "gpt_2",
    "hidden_257",
    "many_small_rows",
    "olmo_no_weight",
    "residual_wider",
    "hf_layer_bf16",
)
NAMES += ("longer_than_a_backward_block_layer", "longer_than_a_block", "longer_than_a_block_layer")
FORMS = ("forward", "backward", "in-place", "strided")
# x alone has more than 2^31 elements, of 4 GiB in bfloat16.
LARGE = (131_073, 16_384)


def forward(framework: Torch, case: Case, given: dict[str, Any]) -> float:
    """Return the worst error of y and residual_out, in units of its bound."""
    y, residual_out = framework.call(case, _moved(framework, given), "triton")
    return _forward_error(framework, case, given, y, residual_out)


def backward(framework: Torch, case: Case, given: dict[str, Any]) -> float:
    """Return the worst error of the gradients."""
    residual_out, gradients = framework.gradients(case, _moved(framework, given), "triton")
    h = given["x"] if residual_out is None else framework.numpy(residual_out)
    expected = expected_backward(case.problem(), given["dy"], given["dresidual_out"], h, given["weight"])
    error = max(worst(_numpy(framework, gradient), expected[f"d{name}"]) for name, gradient in gradients.items())
    spoil(gradients.values())
    return error


def in_place(framework: Torch, case: Case, given: dict[str, Any]) -> float:
    """Return the worst error of what is written into x and the residual."""
    moved, options = _moved(framework, given), {"eps": case.eps, "rounding": case.rounding, "implementation": "triton"}
    function = getattr(framework.front_end, f"{case.function}_")
    function(*(moved[name] for name in ("x", "residual", "weight", "bias")), **options)
    return _forward_error(framework, case, given, moved["x"], moved["residual"])


def strided(framework: Torch, case: Case, given: dict[str, Any]) -> float:
    """Return the worst error where the rows of x are every second one of an array."""
    moved = _moved(framework, given)
    twice = framework.array(np.repeat(given["x"], 2, axis=-2))
    y, residual_out = framework.call(case, moved | {"x": twice[..., ::2, :]}, "triton")
    return _forward_error(framework, case, given, y, residual_out)


def takes(case: Case, form: str) -> bool:
    """Whether a case can be computed in a form: in place x and residual_out keep their dtypes, and strides need rows."""
    return form != "in-place" or (case.residual is not None and case.residual_dtype is None and case.out_dtype is None)


def small(device: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield by its name what computes and verifies one call."""
    functions = dict(zip(FORMS, (forward, backward, in_place, strided), strict=True))
    framework = Torch(device)
    for case in CASES:
        for form, function in functions.items():
            if case.name in NAMES and takes(case, form):
                yield f"{case.name}, {form}", partial(function, framework, case, case.arrays())


def large(device: str, shape: tuple[int, int] = LARGE) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield by its name what computes a pass on many long rows and verifies some of them."""

    def verified(contest: Contest) -> float:
        given = sparse(contest, gpu.arrays(device, contest, 0))
        program = with_torch.normkit_torch(contest)
        assert program.results is not None
        buffers = program.put(given)
        return worst_error(contest, expectations(contest, given), program.results(buffers, program.ready(buffers)()))

    for pass_ in ("forward", "in-place", "backward"):
        contest = Contest(Shape(*shape), "bfloat16", "rms", pass_)
        yield str(contest), partial(verified, contest)


@contextmanager
def launching_by(launch_step: Callable[[Any, Any], None]) -> Iterator[None]:
    """Have this launch each step meanwhile, by its arguments; nothing that was bound before is launched then."""
    unbound = [patch.object(module, "_ready", _not_bound) for module in (launch, launch_backward)]
    with patch.object(steps, "launch", launch_step), unbound[0], unbound[1]:
        yield


def _not_bound(*_: object) -> None:
    return None


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Count the launches of each kernel meanwhile."""
    counted: Counter[str] = Counter()
    original = steps.launch

    def counting(step: Any, arguments: Any) -> None:
        counted[step.kernel] += 1
        original(step, arguments)

    with launching_by(counting):
        yield counted


def main(arguments: list[str] | None = None) -> int:
    """Make all calls; return 1 if one failed or was wrong, or a kernel was never launched."""
    parser = argparse.ArgumentParser(description="every Triton kernel in every form, verified")
    parser.add_argument("--large", action="store_true", help="rows of more than 2^31 elements together instead")
    parser.add_argument("--tiny", action="store_true", help="interpret the kernels on the processor; needs TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    if options.tiny:
        interpret(parser)
    device = "cpu" if options.tiny else "cuda"
    calls = large(device, (3, 64) if options.tiny else LARGE) if options.large else small(device)
    failed = 0
    with launches() as counted:
        for name, call in calls:
            try:
                error = call()
                print(f"{error:8.3f}  {name}{'' if error <= 1 else '  WRONG'}", flush=True)
            # Any exception: the other calls shall be made all the same, and this one is reported.
            except Exception as failure:  # noqa: BLE001
                error = math.inf
                print(f"  FAILED  {name}: {type(failure).__name__}: {failure}", flush=True)
            failed += not error <= 1
    print(*(f"{name} {counted[name]}" for name in kernels.__all__), sep=", ")
    missing = [] if options.large else [name for name in kernels.__all__ if not counted[name]]
    if missing:
        print("never launched:", *missing)
    return 1 if failed or missing else 0


def interpret(parser: argparse.ArgumentParser) -> None:
    """Have Triton interpret its kernels on CPU tensors, as its tests do."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--tiny interprets the kernels: set TRITON_INTERPRET=1")
    from tests import interpreter

    interpreter.install()


def _moved(framework: Torch, given: dict[str, Any]) -> dict[str, Any]:
    return {name: framework.array(array) for name, array in given.items()}


def _numpy(framework: Torch, tensor: Any) -> Any:
    array = framework.numpy(tensor)
    assert array is not None
    return array


def _forward_error(framework: Torch, case: Case, given: dict[str, Any], y: Any, residual_out: Any) -> float:
    computed = residual_out if case.residual else None
    operands = {name: given[name] for name in ("x", "residual", "weight", "bias")}
    expected = expected_forward(case.problem(), **operands, residual_out=framework.numpy(computed))
    pairs = [(actual, of) for actual, of in zip((y, computed), expected, strict=True) if actual is not None]
    error = max(worst(_numpy(framework, actual), of) for actual, of in pairs)
    spoil(actual for actual, _ in pairs)
    return error


if __name__ == "__main__":
    raise SystemExit(main())
