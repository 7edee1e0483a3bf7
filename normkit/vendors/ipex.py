# SPDX-License-Identifier: Apache-2.0
"""The `ipex` implementation: norms of Intel Extension for PyTorch (https://github.com/intel/intel-extension-for-pytorch).

They are `rms_norm(x, weight, eps)`, `add_rms_norm(residual, x, weight, bias, eps, add_back)` and `add_layer_norm` with the same
arguments, of `intel_extension_for_pytorch.llm.functional`. With add_back the residual is overwritten by the sum.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from typing import Any, NamedTuple

from ..arrays import Array
from ..interface import Forward, Guarded, Rejected, Run
from ..spec import NormSpec, Problem
from . import exchange, guards, rounding
from .exchange import Given, Results
from .prepared import on_tensors

DISTRIBUTION = "intel-extension-for-pytorch"
OPERATORS = ("rms_norm", "add_rms_norm", "add_layer_norm")


class Found(NamedTuple):
    """What is installed, the type of device it is built for, or why it cannot be used."""

    version: str | None
    device: str | None
    problem: str | None


def supports(problem: Problem) -> Rejected | None:
    """Accept RMSNorm, and in 16 bits LayerNorm with a residual, of contiguous rows of one dtype, without gradients."""
    reason = guards.refusal(problem, "IPEX") or _missing() or _refusal(problem)
    # only now is anything imported
    reason = reason or found().problem or _not_there(problem) or rounding.refusal(problem, compute, "IPEX")
    return None if reason is None else Rejected(reason)


def forward(problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Forward:
    """Compute y and residual_out; x and residual are not written."""
    return exchange.forward(compute, problem, x, residual, weight, bias)


def forward_(problem: Problem, x: Array, residual: Array, weight: Array | None, bias: Array | None) -> None:
    """Write residual_out into residual, which IPEX does itself, and y into x, from memory that IPEX takes for it."""
    exchange.forward_(compute, problem, x, residual, weight, bias)


def prepare(guarded: Guarded) -> Run:
    """Return what computes calls like one before."""
    return on_tensors(guarded, compute)


def compute(spec: NormSpec, given: Given, out: Results | None) -> Results:
    """Run the operators, as `normkit.vendors.exchange.Compute` says."""
    x, residual, weight, bias = given
    rms_norm, add_rms_norm, add_layer_norm = _operators()
    if weight is None:  # RMSNorm wants one, and LayerNorm takes none as ones
        weight = x.new_ones(x.shape[1])
    if residual is None:
        normed = rms_norm(x, weight, spec.eps)
        return Results(normed if out is None else out.y.copy_(normed), None)
    add_norm = add_rms_norm if spec.kind == "rms" else add_layer_norm
    if out is None:
        return Results(add_norm(residual, x, weight, bias, spec.eps, False), x + residual)
    y, residual_out = out
    in_place = residual_out.data_ptr() == residual.data_ptr()
    if not in_place and spec.kind == "rms" and residual.element_size() == 4:
        # which is faster than to add once more, and in 16 bits would round y otherwise
        residual, in_place = residual_out.copy_(residual), True
    normed = add_norm(residual, x, weight, bias, spec.eps, in_place)
    if not in_place:
        import torch

        torch.add(x, residual, out=residual_out)
    y.copy_(normed)  # last, as it may be where x is
    return out


def _refusal(problem: Problem) -> str | None:
    """Return why the mathematics or the dtypes of a problem are not those of the operators."""
    if problem.spec.kind == "rms":
        if problem.bias_dtype is not None:
            return "IPEX's RMSNorm takes no bias"
        return None
    if problem.residual_dtype is None:
        return "IPEX has no LayerNorm of its own without a residual"
    if problem.x_dtype == "float32":
        return "IPEX computes the variance of LayerNorm in one pass, which in float32 is wrong where the mean is large"
    if problem.spec.rounding is not None:
        return "IPEX computes the variance of LayerNorm in one pass, within the bound of rounding=None alone"
    if problem.weight_dtype not in (None, "float32", problem.x_dtype):
        return f"IPEX's LayerNorm wants the weight in float32 or in x's dtype {problem.x_dtype}, not in {problem.weight_dtype}"
    if problem.bias_dtype not in (None, problem.weight_dtype or problem.x_dtype):
        return f"IPEX's LayerNorm wants the bias in the weight's dtype, not in {problem.bias_dtype}"
    return None


def _not_there(problem: Problem) -> str | None:
    if guards.DEVICES[problem.platform] != found().device:
        return f"the IPEX that is installed is built for {found().device}, not for {problem.platform}"
    return None


def rounds() -> str:
    """Return in words how the operators that were found round."""
    device = found().device
    return f"{rounding.summary(compute, device)} on {device}" if device else ""


@cache
def found() -> Found:
    """Look at what is installed and, only if it can be imported, import it, once."""
    version = _version(DISTRIBUTION)
    missing = _missing()
    if version is None or missing:
        return Found(version, None, missing)
    try:
        operators = _functional()
    # Any exception: which one a library fails with that is not there cannot be foreseen, and this is not the last choice.
    except Exception as error:  # noqa: BLE001
        return Found(version, None, f"IPEX {version} cannot be imported: {type(error).__name__}: {error}")
    absent = [name for name in OPERATORS if not hasattr(operators, name)]
    problem = f"IPEX {version} has no {', '.join(absent)}" if absent else None
    return Found(version, "xpu" if "+xpu" in version else "cpu", problem)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def _missing() -> str | None:
    """Return what is not installed, or not in the version it has to be, without importing anything.

    IPEX belongs to one minor version of torch. Under another one its import fails, and in some releases ends the process.
    """
    version, torch = _version(DISTRIBUTION), _version("torch")
    if version is None or torch is None:
        return f"IPEX is not installed: pip install {DISTRIBUTION}, with the torch of its minor version"
    needed = ".".join(version.split(".")[:2])
    return None if torch.startswith(f"{needed}.") else f"IPEX {version} belongs to torch {needed}, and this is torch {torch}"


@cache
def _operators() -> tuple[Any, ...]:
    """Return the functions, where it can be those of the device's type: those of llm.functional look for them at each call."""
    functional = _functional()
    own = getattr(functional, "utils", None)
    return tuple(getattr(own, f"{name}_{found().device}", getattr(functional, name)) for name in OPERATORS)


@cache
def _functional() -> Any:
    return import_module("intel_extension_for_pytorch.llm.functional")
