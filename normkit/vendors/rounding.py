# SPDX-License-Identifier: Apache-2.0
"""What operators do with 16-bit rows, found by computing some: which rounding policies they follow, and whether rightly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .. import tolerance
from ..arrays import numpy_dtype
from ..spec import NormSpec, Operand, Problem, describe
from .exchange import Compute, Given, Results
from .guards import DEVICES

POLICIES = ("sum", "stored", "hf")
# Short rows, in which rounding changes the statistics most; many, as the policies differ in some of the values only.
_SHAPE = (1024, 16)
# Of the values that a policy gives, as many come out the same to the bit: arithmetic in float32 in another order moves up to
# one in a thousand across a boundary of rounding, and another policy moves one in twenty or more.
_AGREEMENT = 0.99


@dataclass(frozen=True)
class Rounding:
    """What was found: the policies that the operators follow, and what is wrong with their results (None if nothing is)."""

    policies: tuple[str, ...]
    problem: str | None

    def __str__(self) -> str:
        return self.problem or " and ".join(map(repr, self.policies)) or "none of the policies exactly"


def refusal(problem: Problem, compute: Compute, vendor: str) -> str | None:
    """Return why a vendor's operators do not round as a problem asks, None if they do.

    Args:
        problem: the call.
        compute: runs the operators.
        vendor: what they belong to, for the sentence.
    """
    if problem.x_dtype == "float32" or not problem.rows:
        return None
    found = measured(
        compute,
        problem.spec.kind,
        problem.x_dtype,
        problem.residual_dtype is not None,
        problem.in_place,
        DEVICES[problem.platform],
    )
    if found.problem:
        return f"{vendor} computes {problem.x_dtype} wrongly here: {found.problem}"
    if problem.spec.rounding not in (None, *found.policies):
        return f"{vendor} rounds {problem.x_dtype} as {found}, not as {problem.spec.rounding!r}"
    return None


def summary(compute: Compute, device: str) -> str:
    """Return in words how the add and RMSNorm round on a type of device."""
    found = {dtype: measured(compute, "rms", dtype, True, False, device) for dtype in ("bfloat16", "float16")}
    return ", ".join(f"{dtype}: {rounding}" for dtype, rounding in found.items())


@cache
def measured(compute: Compute, kind: str, dtype: str, adds: bool, in_place: bool, device: str) -> Rounding:
    """Compute some rows, once for each combination of these arguments, and compare.

    Args:
        compute: runs the operators.
        kind: "rms" or "layer".
        dtype: of all arrays, "bfloat16" or "float16".
        adds: whether there is a residual.
        in_place: whether the results are to overwrite x and residual.
        device: torch's name of its type.
    """
    import torch

    generator = np.random.default_rng(0)
    x, residual = generator.standard_normal((2, *_SHAPE)).astype(numpy_dtype(dtype))
    weight = generator.standard_normal(_SHAPE[1]).astype(numpy_dtype(dtype))
    operand, row = Operand(_SHAPE, dtype), Operand(_SHAPE[1:], dtype)
    problem = describe(NormSpec(kind), operand, operand if adds else None, row)

    def tensor(array: Any) -> Any:
        return torch.from_numpy(array.view(np.int16)).view(getattr(torch, dtype)).clone().to(device)

    given = Given(tensor(x), tensor(residual) if adds else None, tensor(weight), None)
    results = compute(problem.spec, given, Results(given.x, given.residual) if in_place else None)
    y, residual_out = (None if one is None else one.cpu().view(torch.int16).numpy().view(numpy_dtype(dtype)) for one in results)

    expected = tolerance.expected_forward(problem, x, residual if adds else None, weight)
    worst = [tolerance.worst(one, of) for one, of in zip((y, residual_out), expected, strict=True) if one is not None]
    if max(worst) > 1:
        return Rounding((), f"results are up to {max(worst):.2g} times as far from the exact ones as one rounding explains")
    same = {policy: np.mean(y == _by_policy(policy, problem, x, residual if adds else None, weight)) for policy in POLICIES}
    return Rounding(tuple(policy for policy in POLICIES if same[policy] >= _AGREEMENT), None)


def _by_policy(policy: str, problem: Problem, x: Any, residual: Any, weight: Any) -> Any:
    """Return y as one policy gives it, in float32."""
    h = x.astype(np.float32)
    if residual is not None:
        h = h + residual.astype(np.float32)
        h = h if policy == "sum" else h.astype(x.dtype).astype(np.float32)
    centred = h - h.mean(-1, keepdims=True) if problem.spec.subtract_mean else h
    x_hat = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(problem.spec.eps))
    if policy == "hf":
        x_hat = x_hat.astype(x.dtype).astype(np.float32)
    return (x_hat * weight.astype(np.float32)).astype(x.dtype)
