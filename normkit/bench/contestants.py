# SPDX-License-Identifier: Apache-2.0
"""Who can compete: normkit through its public functions, its peers, and the copy that all are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from . import peers, with_arrays, with_torch
from .contest import Contest, Program
from .device import NAMES

FRAMEWORKS = ("torch", "jax", "numpy")

COPY = "copy"
"""The name of the copy, which takes part in every contest."""

_NOT_IN = {
    ("torch", "forward-and-backward"): "torch computes the backward by itself: see the pass backward",
    ("jax", "in-place"): "JAX writes in place only within a compiled program",
    ("jax", "backward"): "a compiled JAX program computes forward and backward together: see the pass forward-and-backward",
    ("numpy", "in-place"): "there is no function in place for NumPy arrays: out= takes its place",
    ("numpy", "backward"): "NumPy has no gradients",
    ("numpy", "forward-and-backward"): "NumPy has no gradients",
}


def _none(contest: Contest) -> str | None:
    return None


@dataclass(frozen=True)
class Contestant:
    """One contestant.

    Attributes:
        name: as options and tables have it.
        framework: whose arrays it takes: "torch", "jax" or "numpy".
        program: how it computes a contest that it does not refuse.
        limits: why it does not compute a contest, None if it does.
        ours: whether it is normkit, whose results have to be within their bounds, and with which the others are compared.
        devices: those that it runs on, of `normkit.bench.device.NAMES`.
    """

    name: str
    framework: str
    program: Callable[[Contest], Program]
    limits: Callable[[Contest], str | None] = _none
    ours: bool = False
    devices: tuple[str, ...] = ("cpu",)

    def refusal(self, contest: Contest) -> str | None:
        """Return why this contestant does not take part in a contest, None if it does."""
        if not find_spec(self.framework):
            return f"{self.framework} is not installed: pip install {self.framework}"
        if self.name == COPY:
            return None
        return _NOT_IN.get((self.framework, contest.pass_)) or self.limits(contest)


TABLE = (
    Contestant("normkit_torch", "torch", with_torch.normkit_torch, ours=True, devices=NAMES),
    Contestant("normkit_torch.compile", "torch", with_torch.normkit_compiled, devices=NAMES),
    Contestant("torch", "torch", with_torch.eager, devices=NAMES),
    Contestant("torch.compile", "torch", with_torch.compiled, devices=NAMES),
    Contestant("vllm", "torch", with_torch.vllm_operator, with_torch.vllm_refusal, devices=NAMES),
    *(Contestant(name, "torch", *peer, devices=("cuda",)) for name, peer in peers.TABLE.items()),
    Contestant("ipex", "torch", with_torch.ipex_operator, with_torch.ipex_refusal),
    Contestant("normkit_jax", "jax", with_arrays.normkit_jax, ours=True),
    Contestant("jax.jit", "jax", with_arrays.plain_jax),
    Contestant("normkit", "numpy", with_arrays.normkit, ours=True),
    Contestant("numpy", "numpy", with_arrays.plain_numpy),
)


def copy() -> Contestant:
    """Return the copy: torch's, which uses all threads, or NumPy's where there is no torch."""
    if find_spec("torch"):
        return Contestant(COPY, "torch", with_torch.copy)
    return Contestant(COPY, "numpy", with_arrays.copy)
