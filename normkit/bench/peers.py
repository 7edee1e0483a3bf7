# SPDX-License-Identifier: Apache-2.0
"""Others' fused kernels for NVIDIA GPUs, each by its public function, where it is installed.

The signatures are those of the sources named, as they were in August 2026; one that has changed since fails, and is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from .contest import Contest, Program
from .with_torch import in_place_operator, program

Refusal = Callable[[Contest], str | None]


def liger(contest: Contest) -> Program:
    """linkedin/Liger-Kernel, src/liger_kernel/transformers/functional.py: liger_fused_add_rms_norm, liger_layer_norm.

    Its fused function rounds the sum before it takes statistics ("gemma" computes all else in float32), and writes dx over dy
    if it may, which it may not here. It has no fused addition for LayerNorm.
    """
    functional = import_module("liger_kernel.transformers.functional")

    def fused(x: object, residual: object, weight: object, bias: object) -> object:
        return functional.liger_fused_add_rms_norm(x, residual, weight, contest.eps, 0.0, "gemma", False)

    def added(x: object, residual: object, weight: object, bias: object) -> object:
        h = x + residual  # type: ignore[operator]
        return functional.liger_layer_norm(h, weight, bias, contest.eps), h

    return program(contest, lambda tensors: partial(fused if contest.kind == "rms" else added, *tensors[:4]))


def quack(contest: Contest) -> Program:
    """Dao-AILab/quack, quack/rmsnorm.py: rmsnorm(x, weight=None, bias=None, residual=None, ..., eps=1e-6, ...)."""
    rmsnorm = import_module("quack.rmsnorm").rmsnorm
    both = {"prenorm": True}  # so that it returns the sum too
    return program(contest, lambda of: partial(rmsnorm, of.x, of.weight, residual=of.residual, eps=contest.eps, **both))


def flash_attn(contest: Contest) -> Program:
    """Dao-AILab/flash-attention, flash_attn/ops/triton/layer_norm.py: layer_norm_fn and rms_norm_fn.

    Both are (x, weight, bias, residual=None, ..., eps=1e-6, ...).
    """
    function = getattr(import_module("flash_attn.ops.triton.layer_norm"), f"{contest.kind}_norm_fn")
    options = {"eps": contest.eps, "prenorm": True}  # so that it returns the sum too
    return program(contest, lambda of: partial(function, of.x, of.weight, of.bias, residual=of.residual, **options))


def flashinfer(contest: Contest) -> Program:
    """flashinfer-ai/flashinfer, flashinfer/norm/__init__.py: fused_add_rmsnorm(input, residual, weight, eps, ...), in place."""
    return in_place_operator(contest, import_module("flashinfer.norm").fused_add_rmsnorm)


def _refusal(module: str, distribution: str, kinds: tuple[str, ...], passes: tuple[str, ...]) -> Refusal:
    def refusal(contest: Contest) -> str | None:
        if not find_spec(module):
            return f"{module} is not installed: pip install {distribution}"
        if contest.kind not in kinds:
            return f"{module} has no LayerNorm that adds"
        return None if contest.pass_ in passes else f"{module} has no function for the pass {contest.pass_}"

    return refusal


_BOTH, _RMS = ("rms", "layer"), ("rms",)
_FUNCTIONAL = ("forward", "backward")

TABLE: dict[str, tuple[Callable[[Contest], Program], Refusal]] = {
    "liger": (liger, _refusal("liger_kernel", "liger-kernel", _BOTH, _FUNCTIONAL)),
    "quack": (quack, _refusal("quack", "quack-kernels", _RMS, _FUNCTIONAL)),
    "flash_attn": (flash_attn, _refusal("flash_attn", "flash-attn", _BOTH, _FUNCTIONAL)),
    "flashinfer": (flashinfer, _refusal("flashinfer", "flashinfer-python", _RMS, ("forward", "in-place"))),
}
"""By name: the program, and why it does not take part."""
