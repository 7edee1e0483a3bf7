# SPDX-License-Identifier: Apache-2.0
"""Others' kernels for GPUs in `normkit bench`: functions of the same signatures, in plain torch, stand in for them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from normkit.bench import gpu, measure
from normkit.bench.compete import compete
from normkit.bench.contest import Case, Contest
from normkit.bench.contestants import COPY, TABLE, copy

PEERS = {
    "liger": "liger_kernel.transformers.functional",
    "quack": "quack.rmsnorm",
    "flash_attn": "flash_attn.ops.triton.layer_norm",
    "flashinfer": "flashinfer.norm",
}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)


def module(name: str, **functions: Any) -> dict[str, ModuleType]:
    """Return a module with functions, and the packages that it is in."""
    parts = name.split(".")
    found = {".".join(parts[: n + 1]): ModuleType(".".join(parts[: n + 1])) for n in range(len(parts))}
    for each in found.values():
        each.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    vars(found[name]).update(functions)
    return found


def _norm(kind: str, h: Any, weight: Any, bias: Any, eps: float) -> Any:
    functional, hidden = torch.nn.functional, h.shape[-1:]
    return functional.rms_norm(h, hidden, weight, eps) if kind == "rms" else functional.layer_norm(h, hidden, weight, bias, eps)


def _peers() -> dict[str, dict[str, Any]]:
    """Functions with the parameters that the packages' own have, in plain torch."""

    def liger_fused_add_rms_norm(  # type: ignore[no-untyped-def]
        X, R, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
    ):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        return _norm("rms", X + R, W, None, eps), X + R

    def liger_layer_norm(X, W, B, eps):  # type: ignore[no-untyped-def]
        return _norm("layer", X, W, B, eps)

    def rmsnorm(  # type: ignore[no-untyped-def]
        x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False
    ):
        assert prenorm and bias is None
        return _norm("rms", x + residual, weight, None, eps), x + residual

    def flash(kind: str) -> Any:
        def function(x, weight, bias, residual=None, x1=None, eps=1e-6, dropout_p=0.0, prenorm=False):  # type: ignore[no-untyped-def]
            assert prenorm
            return _norm(kind, x + residual, weight, bias, eps), x + residual

        return function

    def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
        residual += input
        input.copy_(_norm("rms", residual, weight, None, eps))

    return {
        "liger": {"liger_fused_add_rms_norm": liger_fused_add_rms_norm, "liger_layer_norm": liger_layer_norm},
        "quack": {"rmsnorm": rmsnorm},
        "flash_attn": {"rms_norm_fn": flash("rms"), "layer_norm_fn": flash("layer")},
        "flashinfer": {"fused_add_rmsnorm": fused_add_rmsnorm},
    }


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("pass_", ["forward", "in-place", "backward"])
def test_peers_are_called_by_their_signatures(name: str, kind: str, pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, content in module(PEERS[name], **_peers()[name]).items():
        monkeypatch.setitem(sys.modules, path, content)
    contest = Contest(Case(5, 64), "float32", kind, pass_, "device")
    peer = next(each for each in TABLE if each.name == name)
    rows, absent = compete(contest, [peer, copy()], gpu.stand_in(), seconds=1e-6)
    if absent:
        assert name in ("quack", "flashinfer") or pass_ == "in-place", absent
        assert "has no" in absent[0].reason
    else:
        assert [(row.contestant, row.within_bounds) for row in rows] == [(name, "yes"), (COPY, "")]


def test_a_peer_that_is_not_there_is_named_with_how_to_get_it() -> None:
    contest = Contest(Case(5, 64), "float32", "rms", "forward", "device")
    for name, path in PEERS.items():
        if not find_spec(path.split(".")[0]):
            peer = next(each for each in TABLE if each.name == name)
            assert "is not installed: pip install" in str(peer.refusal(contest))
