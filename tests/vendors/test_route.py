# SPDX-License-Identifier: Apache-2.0
"""Without a name: on the vendor's platform its operators are the choice, and they are what runs.

The platform is faked where it is detected, and the devices that torch has there are said to be CPUs. The rest is real.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import normkit_torch
from normkit.spec import NormSpec, Operand, describe
from normkit.vendors import guards
from normkit_torch import device, prepared

from .vendor import MODULE, NAME, OPERATOR, PLATFORM, rows

ROOT = Path(__file__).parents[2]

IN_JAX = """
import jax, numpy as np
from jax.interpreters import mlir
from normkit.spec import NormSpec, Operand, describe
from normkit.vendors import guards
from normkit_jax import device, primitive
import normkit_jax
from tests.vendors.vendor import recorded
guards.DEVICES[{platform!r}] = "cpu"
device.platform_of = lambda _: {platform!r}
device.arch_of = lambda *_: "gfx942"
mlir.register_lowering(primitive.forward_p, primitive.lowering("forward", {platform!r}), platform="cpu")
rng = np.random.default_rng(0)
x, residual, weight = (jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for shape in ((4, 64), (4, 64), 64))
verdicts = normkit_jax.explain("add_rms_norm", x, residual, weight)
assert next(verdict.name for verdict in verdicts if verdict.accepted) == {name!r}
with recorded() as calls:
    y, residual_out = jax.block_until_ready(jax.jit(normkit_jax.add_rms_norm)(x, residual, weight))
assert len(calls) == 1
artefact = jax.export.export(jax.jit(normkit_jax.add_rms_norm))(x, residual, weight)
assert "callback" not in artefact.mlir_module() and len(calls) == 1
h = x + residual
np.testing.assert_allclose(y, h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * weight, rtol=1e-5, atol=1e-5)
np.testing.assert_array_equal(residual_out, h)
"""


@pytest.fixture
def _there() -> Iterator[None]:
    prepared.forget()
    with patch.object(device, "platform_of", lambda _: (PLATFORM, "gfx942")), patch.dict(guards.DEVICES, {PLATFORM: "cpu"}):
        yield
    prepared.forget()


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("in_place", [False, True])
def test_torch_takes_the_vendor(in_place: bool) -> None:
    x, residual, weight = (torch.from_numpy(array) for array in (rows(4, 64), rows(4, 64, seed=1), rows(64, seed=2)))
    h = (x + residual).double().numpy()
    verdicts = normkit_torch.explain("add_rms_norm", x, residual, weight)
    assert next(verdict.name for verdict in verdicts if verdict.accepted) == NAME
    function = normkit_torch.add_rms_norm_ if in_place else normkit_torch.add_rms_norm
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y, residual_out = function(x, residual, weight)
    assert sum(event.count for event in profile.key_averages() if event.key == OPERATOR) == 1
    np.testing.assert_allclose(y, h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * weight.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(residual_out, h, rtol=1e-7)


@pytest.mark.usefixtures("_there")
def test_what_the_vendor_refuses_goes_to_the_next() -> None:
    x, weight = torch.from_numpy(rows(4, 64)), torch.from_numpy(rows(64))
    for function in ("layer_norm", "add_layer_norm"):
        operands = [x, x, weight] if "add" in function else [x, weight]
        verdicts = normkit_torch.explain(function, *operands)
        assert next(verdict.name for verdict in verdicts if verdict.accepted) == "reference"
        assert all(verdict.reason for verdict in verdicts)
    verdicts = normkit_torch.explain("rms_norm", x.requires_grad_(), weight)
    assert "no backward pass" in next(verdict.reason for verdict in verdicts if verdict.name == NAME)


@pytest.mark.usefixtures("_there")
def test_an_operator_that_fails_or_is_too_large_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(MODULE, "compute", compute)
    for dtype in (torch.float32, torch.float16):
        x, weight = torch.from_numpy(rows(4, 64)).to(dtype), torch.from_numpy(rows(64)).to(dtype)
        verdicts = normkit_torch.explain("rms_norm", x, weight)
        assert "no kernel image" in next(verdict.reason for verdict in verdicts if verdict.name == NAME)
        torch.testing.assert_close(
            normkit_torch.rms_norm(x, weight), normkit_torch.rms_norm(x, weight, implementation="reference")
        )
    large = describe(NormSpec("rms"), Operand((2**20, 4096), "float32"), platform=PLATFORM)
    assert "counts elements in 32 bits" in str(MODULE.supports(large))


def test_jax_takes_the_vendor() -> None:
    code = IN_JAX.format(platform=PLATFORM, name=NAME)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
