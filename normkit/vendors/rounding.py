# SPDX-License-Identifier: Apache-2.0
"""What operators do with 16-bit rows, found by computing some: which rounding policies they follow, and whether rightly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import tolerance
from ..arrays import numpy_dtype
from ..spec import NormSpec, Operand, Problem, describe
from .exchange import Compute, Given, Results
from .guards import DEVICES

POLICIES = ("sum", "stored", "hf")
# Many short rows: in short ones rounding changes the statistics most, and the policies differ in some of the values only.
_ROWS = 1024
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
    if not problem.rows:
        return None
    kind, adds, device = problem.spec.kind, problem.residual_dtype is not None, DEVICES[problem.platform]
    probe = Probe(compute, kind, problem.x_dtype, adds, problem.in_place, problem.hidden_size % 8 != 0, device)
    if probe not in _found:
        if device == "cuda" and _capturing():
            return f"how {vendor} rounds is found by computing, which a graph that is captured forbids: call it once before"
        _found[probe] = _measure(probe)
    found = _found[probe]
    if found.problem:
        return f"{vendor} computes {problem.x_dtype} wrongly here: {found.problem}"
    if problem.spec.rounding not in (None, *found.policies):
        return f"{vendor} rounds {problem.x_dtype} as {found}, not as {problem.spec.rounding!r}"
    return None


def summary(compute: Compute, device: str) -> str:
    """Return in words how the add and RMSNorm round on a type of device."""
    probes = {dtype: Probe(compute, "rms", dtype, True, False, False, device) for dtype in ("bfloat16", "float16")}
    return ", ".join(f"{dtype}: {_measure(probe)}" for dtype, probe in probes.items())


class Probe(NamedTuple):
    """What makes operators choose among kernels of theirs, which may round in different ways."""

    compute: Compute
    kind: str
    dtype: str
    adds: bool
    in_place: bool
    odd: bool
    device: str


_found: dict[Probe, Rounding] = {}


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _measure(probe: Probe) -> Rounding:
    """Compute some rows and compare."""
    dtype, shape = probe.dtype, (_ROWS, 17 if probe.odd else 16)
    generator = np.random.default_rng(0)
    x, residual = generator.standard_normal((2, *shape)).astype(numpy_dtype(dtype))
    weight = generator.standard_normal(shape[1]).astype(numpy_dtype(dtype))
    operand = Operand(shape, dtype)
    problem = describe(NormSpec(probe.kind), operand, operand if probe.adds else None, Operand(shape[1:], dtype))
    try:
        y, residual_out = _compute(probe, problem, x, residual, weight)
    except RuntimeError as error:
        # such as that of a library that is built for other GPUs
        return Rounding((), str(error))
    expected = tolerance.expected_forward(problem, x, residual if probe.adds else None, weight)
    worst = [tolerance.worst(one, of) for one, of in zip((y, residual_out), expected, strict=True) if one is not None]
    if max(worst) > 1:
        return Rounding((), f"results are up to {max(worst):.2g} times as far from the exact ones as one rounding explains")
    same = {
        policy: np.mean(y == _by_policy(policy, problem, x, residual if probe.adds else None, weight)) for policy in POLICIES
    }
    # in float32 nothing is rounded on the way
    policies = (policy for policy in POLICIES if dtype == "float32" or same[policy] >= _AGREEMENT)
    return Rounding(tuple(policies), None)


def _compute(probe: Probe, problem: Problem, x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
    """Run the operators on NumPy arrays, whatever mode torch is in."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    bits, dtype = (torch.int32 if probe.dtype == "float32" else torch.int16), numpy_dtype(probe.dtype)

    def tensor(array: Any) -> Any:
        own = torch.from_numpy(array.view(f"i{dtype.itemsize}").copy())
        return own.view(getattr(torch, probe.dtype)).to(probe.device)

    with _disable_current_modes(), torch.no_grad():
        given = Given(tensor(x), tensor(residual) if probe.adds else None, tensor(weight), None)
        results = probe.compute(problem.spec, given, Results(given.x, given.residual) if probe.in_place else None)
        y, residual_out = (None if one is None else one.cpu().view(bits).numpy().view(dtype) for one in results)
    return y, residual_out


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
