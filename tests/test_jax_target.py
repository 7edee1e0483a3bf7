# SPDX-License-Identifier: Apache-2.0
"""Which architecture JAX programs are compiled for: the device's or the one named, and every contradiction refused."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

import jax

import normkit_jax
from normkit.errors import MissingPackageError, OptionError, UnsupportedError
from normkit_jax import device, rms_norm, target

from .jax_gpu.decoder import messages

X = jax.ShapeDtypeStruct((4, 256), "float32")


def architectures(text: str) -> list[int]:
    return [message.kernel.compute_capability for message, _ in messages(text)]


def lower(function: Any = rms_norm, platform: str = "cuda") -> str:
    return str(jax.jit(function).trace(X).lower(lowering_platforms=(platform,)).as_text())


def pretend(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """Let the devices be of an architecture."""
    monkeypatch.setattr(device, "arch_of", lambda platform, devices: architecture)


def test_without_device_and_target_nothing_is_guessed() -> None:
    with pytest.raises(UnsupportedError, match=r"no cuda device here.*normkit_jax\.target\('sm_90'\)"):
        lower(lambda x: rms_norm(x, eps=0.5))


def test_without_device_and_target_the_reference_still_lowers() -> None:
    assert "custom_call" not in lower(lambda x: rms_norm(x, implementation="reference"))


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 1), reason="the kernels need jax 0.11.1 on rocm")
def test_without_device_and_target_nothing_is_guessed_on_rocm() -> None:
    with pytest.raises(UnsupportedError, match=r"no rocm device here.*normkit_jax\.target\('gfx942'\)"):
        lower(platform="rocm")


def test_a_target_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not passed over: the program would then have no kernels."""
    monkeypatch.setattr(sys.modules["normkit_jax.target"], "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install triton"):
        target("sm_90")


def test_a_target_of_another_platform_is_refused() -> None:
    with target("gfx942"), pytest.raises(OptionError, match="target 'gfx942' is not an architecture of cuda"):
        lower()


@pytest.mark.parametrize("names", [("h200",), ("sm_90", "sm_100"), ("sm_90", "gfx942", "gfx950"), ("",)], ids=str)
def test_what_is_no_target_is_refused_at_once(names: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="one architecture like sm_90 and one like gfx942"):
        target(*names)


@pytest.mark.parametrize("name", ["sm_90a", "sm_", "sm_x"])
def test_an_architecture_that_is_not_known_is_refused(name: str) -> None:
    with target(name), pytest.raises(OptionError, match=f"arch='{name}' is not known"):
        lower()


def test_the_device_names_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "sm_80")
    assert architectures(lower(lambda x: rms_norm(x, eps=0.25))) == [80]


def test_a_target_that_is_not_the_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "sm_80")
    with target("sm_90"), pytest.raises(OptionError, match=r"'sm_90' was named.*cuda devices to compile for are sm_80"):
        lower()
    with target("sm_80"):
        assert architectures(lower()) == [80]


def test_one_function_is_traced_again_for_each_target() -> None:
    function = jax.jit(lambda x: rms_norm(x))
    for name, capability in (("sm_90", 90), ("sm_80", 80), ("sm_90", 90)):
        with target(name):
            text = function.trace(X).lower(lowering_platforms=("cuda",)).as_text()
        assert architectures(text) == [capability]


def test_targets_nest() -> None:
    with target("sm_90"):
        with target("sm_80"):
            assert architectures(lower()) == [80]
        assert architectures(lower()) == [90]


def test_a_target_changes_nothing_where_there_are_no_kernels() -> None:
    x = jax.numpy.arange(8.0).reshape(2, 4)
    with target("sm_90"):
        assert (rms_norm(x) == rms_norm(x, implementation="reference")).all()


@pytest.mark.parametrize(("major_minor", "expected"), [("9.0", "sm_90"), ("10.0", "sm_100"), ("8.6", "sm_86")])
def test_the_architecture_of_a_device(major_minor: str, expected: str) -> None:
    assert device.arch_of("cuda", [Device("PJRT C API\nCUDA 13000", major_minor)]) == expected


def test_the_architecture_of_an_amd_device() -> None:
    devices = [Device("rocm 70000", "gfx942:sramecc+:xnack-")]
    assert device.arch_of("rocm", devices) == "gfx942"
    assert device.arch_of("cuda", devices) is None


class Device:
    """What a GPU of JAX says of itself."""

    platform = "gpu"

    def __init__(self, platform_version: str, compute_capability: str) -> None:
        self.client = self
        self.platform_version = platform_version
        self.compute_capability = compute_capability


def test_triton_on_the_cpu_is_refused_with_the_reason() -> None:
    x = jax.numpy.ones((2, 64))
    with pytest.raises(UnsupportedError, match="Triton runs on cuda, rocm, not on cpu"):
        rms_norm(x, implementation="triton")
    with pytest.raises(UnsupportedError, match="Triton runs on cuda, rocm, not on cpu"):
        jax.jit(lambda x: rms_norm(x, implementation="triton"))(x)


def test_explain_says_why() -> None:
    x = jax.numpy.ones((2, 64))
    verdicts = {verdict.name: verdict for verdict in normkit_jax.explain("rms_norm", x)}
    assert not verdicts["triton"].accepted
    assert verdicts["triton"].reason == "Triton runs on cuda, rocm, not on cpu"
    assert verdicts["reference"].accepted


def test_explain_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.numpy.ones((2, 64))
    for platform, accepted in (("cuda", True), ("rocm", jax.__version_info__ >= (0, 11, 1)), ("tpu", False)):
        monkeypatch.setattr(device, "platform_of", lambda _, platform=platform: platform)
        verdict = next(verdict for verdict in normkit_jax.explain("rms_norm", x) if verdict.name == "triton")
        assert verdict.accepted == accepted
        assert accepted or platform in str(verdict.reason)
