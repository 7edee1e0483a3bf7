# SPDX-License-Identifier: Apache-2.0
"""Tensors given to write to: what torch allocates and counts, modes, tracing and compilation."""

from __future__ import annotations

from typing import Any

import pytest

from normkit import DtypeError, OptionError, ShapeError

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import normkit_torch

from .test_out import FRAMEWORKS, FUNCTIONS, arrays_of, empty


@pytest.fixture
def tensors() -> list[Any]:
    """x, residual, weight, bias, out and residual_out."""
    framework = FRAMEWORKS["torch"]
    return [*arrays_of(framework, "add_rms_norm"), empty(framework), empty(framework)]


def into(function: str, *tensors: Any) -> Any:
    *given, out, residual_out = tensors
    return getattr(normkit_torch, function)(*given, out=out, residual_out=residual_out)


def profiled() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def allocations(profile: Any) -> list[str]:
    """The operators that torch ran, and what took memory, within a call of normkit and outside of all."""
    named = [event.name for event in profile.events() if event.name.startswith(("aten::", "[memory]"))]
    return named + [
        event.name for event in profile.events() if event.name.startswith("normkit::") and event.self_cpu_memory_usage
    ]


def taken(profile: Any) -> int:
    """The bytes that calls of normkit took."""
    return sum(event.cpu_memory_usage for event in profile.events() if event.name.startswith("normkit::"))


@pytest.mark.parametrize("function", FUNCTIONS[2:])
def test_the_cpu_kernels_allocate_nothing(function: str, tensors: list[Any]) -> None:
    if not {v.name: v for v in normkit_torch.explain(function, *tensors[:4])}["cpu"].accepted:
        pytest.skip("the cpu implementation does not run here")
    strided = [torch.empty(4, 6, 48)[..., :24], torch.empty(4, 12, 24)[:, ::2]]
    for given in (tensors, [*tensors[:4], *strided]):
        addresses = [tensor.data_ptr() for tensor in given]
        with profiled() as profile:
            into(function, *given)
        assert allocations(profile) == []
        assert [tensor.data_ptr() for tensor in given] == addresses
    for _ in range(2):  # the second call is a prepared one
        with profiled() as profile:
            results = getattr(normkit_torch, function)(*tensors[:4])
        assert allocations(profile) and taken(profile) >= sum(result.nbytes for result in results), "they would have been seen"


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_autograd_sees_that_a_tensor_was_written_to(implementation: str, tensors: list[Any]) -> None:
    x, residual, _, _, out, residual_out = tensors
    if not {v.name: v for v in normkit_torch.explain("add_rms_norm", x, residual)}[implementation].accepted:
        pytest.skip(f"{implementation} does not run here")
    leaf = torch.ones(24, device=x.device, requires_grad=True)
    products = [(leaf * out).sum(), (leaf * residual_out).sum()]
    versions = [tensor._version for tensor in tensors]
    normkit_torch.add_rms_norm(x, residual, implementation=implementation, out=out, residual_out=residual_out)
    assert [now._version > before for now, before in zip(tensors, versions, strict=True)] == [False] * 4 + [True] * 2
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_parameters_and_leaves_without_grad_mode(tensors: list[Any]) -> None:

    expected = into("add_rms_norm", *tensors[:4], *(torch.empty_like(out) for out in tensors[4:]))
    leaves = [torch.nn.Parameter(tensor) for tensor in tensors]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = into("add_rms_norm", *leaves)
            assert found[0] is leaves[4] and found[1] is leaves[5]
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    with torch.inference_mode():
        made = into("add_rms_norm", *tensors[:4], *(torch.empty_like(out) for out in tensors[4:]))
        assert torch.equal(made[0], expected[0])


@pytest.mark.parametrize("function", FUNCTIONS[2:])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(function: str, dynamic: bool, tensors: list[Any]) -> None:
    expected = getattr(normkit_torch, function)(*tensors[:4])
    torch.compiler.reset()
    compiled = torch.compile(into, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for out in (tensors[4], torch.empty(6, 4, 24, device=expected[0].device).transpose(0, 1)):
        found = compiled(function, *tensors[:4], out, tensors[5])
        assert found[0] is out and found[1] is tensors[5]
        assert torch.equal(out, expected[0]) and torch.equal(tensors[5], expected[1])
    x, _, weight, bias, _, residual_out = tensors
    assert compiled(function, x, None, weight, bias, None, residual_out)[1] is residual_out
    assert torch.equal(residual_out, x)


def test_what_is_refused_is_refused_in_compiled_code_too(tensors: list[Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(into, backend="aot_eager")
    for out, error in ((tensors[5], OptionError), (tensors[4][:2], ShapeError), (tensors[4].half(), DtypeError)):
        with pytest.raises(error, match=r"^out"):
            compiled("add_rms_norm", *tensors[:4], out, tensors[5])
        assert (tensors[5] == 7).all()


def test_under_a_dispatch_mode(tensors: list[Any]) -> None:
    expected = normkit_torch.add_rms_norm(*tensors[:4])
    with FlopCounterMode(display=False):
        found = into("add_rms_norm", *tensors)
        assert found[0] is tensors[4] and found[1] is tensors[5]
        with pytest.raises(OptionError, match="share memory with x"):
            into("add_rms_norm", *tensors[:4], tensors[0], None)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        assert into("add_rms_norm", *fakes)[0] is fakes[4]
        with pytest.raises(ShapeError, match=r"^out"):
            into("add_rms_norm", *fakes[:4], fakes[4][:2], None)
    metas = [tensor.to("meta") for tensor in tensors]
    assert into("add_rms_norm", *metas)[1] is metas[5]


def test_a_lazily_negated_tensor(tensors: list[Any]) -> None:
    *given, out, residual_out = tensors
    negated = torch._neg_view(out)
    assert into("add_rms_norm", *given, negated, residual_out)[0] is negated
    assert torch.equal(negated, normkit_torch.add_rms_norm(*given)[0])
