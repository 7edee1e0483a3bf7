# SPDX-License-Identifier: Apache-2.0
"""Where Triton cannot launch a kernel, the next implementation computes, and it is said why; one named never falls back."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from normkit import LaunchError, OptionError, UnsupportedError, registry
from normkit.interface import Kernels
from normkit.registry import Implementation
from normkit.spec import NormSpec, Operand, Problem, describe

from .fake_driver import FakeDriver

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import normkit_torch
from normkit_torch import prepared

HIDDEN = 64
Tensors = tuple[Tensor, ...]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def functional(**options: Any) -> Tensors:
    return normkit_torch.add_rms_norm(rows(5, HIDDEN), rows(5, HIDDEN, seed=1), rows(HIDDEN, seed=2), **options)


def in_place(**options: Any) -> Tensors:
    x, residual = rows(5, HIDDEN), rows(5, HIDDEN, seed=1)
    normkit_torch.add_rms_norm_(x, residual, rows(HIDDEN, seed=2), **options)
    assert x._version and residual._version
    return x, residual


def into(**options: Any) -> Tensors:
    out, residual_out = rows(5, HIDDEN, seed=8), rows(5, HIDDEN, seed=9)
    given = rows(5, HIDDEN), rows(5, HIDDEN, seed=1), rows(HIDDEN, seed=2)
    normkit_torch.add_rms_norm(*given, out=out, residual_out=residual_out, **options)
    return out, residual_out


def into_views(**options: Any) -> Tensors:
    out = rows(5, 2 * HIDDEN, seed=8)[:, :HIDDEN]
    return (normkit_torch.rms_norm(rows(5, HIDDEN), rows(HIDDEN, seed=2), out=out, **options),)


def strided(**options: Any) -> Tensors:
    return (normkit_torch.rms_norm(rows(5, 2 * HIDDEN)[:, :HIDDEN], **options),)


def gradient(**options: Any) -> Tensors:
    leaves = [leaf.requires_grad_() for leaf in (rows(5, HIDDEN), rows(5, HIDDEN, seed=1), rows(HIDDEN, seed=2))]
    results = normkit_torch.add_layer_norm(*leaves, **options)
    gradients = torch.autograd.grad(results, leaves, [rows(5, HIDDEN, seed=3), rows(5, HIDDEN, seed=4)])
    return *(result.detach() for result in results), *gradients


def operator(**options: Any) -> Tensors:
    compiled: Any = torch.compile(normkit_torch.add_rms_norm, fullgraph=True, backend="eager")
    with torch.no_grad():
        made: Tensors = compiled(rows(5, HIDDEN), rows(5, HIDDEN, seed=1), rows(HIDDEN, seed=2), **options)
    return made


CALLS = (functional, in_place, into, into_views, strided, gradient, operator)
EACH = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)

ERRORS: dict[str, tuple[str, Exception]] = {
    "no driver": ("driver", RuntimeError("0 active drivers ([]). There should only be one.")),
    "libcuda is not found": ("driver", AssertionError("libcuda.so cannot found!")),
    "no compiler": ("load", subprocess.CalledProcessError(1, ["gcc"])),
    "the wrong architecture": ("load", RuntimeError("Triton Error [CUDA]: no kernel image is available for execution")),
    "out of resources": ("load", OutOfResources(300_000, 232_448, "shared memory")),
    "the driver refuses": ("launch", RuntimeError("Triton Error [CUDA]: invalid argument")),
    "a cache that cannot be written": ("load", PermissionError("[Errno 13] Permission denied: '/cache'")),
}


def failing(driver: FakeDriver, where: str, error: Exception, times: int = 1000) -> None:
    left = iter(range(times))

    def fail(now: str) -> None:
        if now == where and next(left, None) is not None:
            raise error

    driver.fail = fail


def verdict() -> registry.Verdict:
    given = rows(5, HIDDEN), rows(5, HIDDEN, seed=1), rows(HIDDEN, seed=2)
    return {one.name: one for one in normkit_torch.explain("add_rms_norm", *given)}["triton"]


@EACH
@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_next_implementation_computes_and_says_why_once(
    call: Callable[..., Tensors], name: str, driver: FakeDriver
) -> None:
    where, error = ERRORS[name]
    expected = call(implementation="reference")
    failing(driver, where, error)
    with pytest.warns(RuntimeWarning) as said:
        found = call()
    (message,) = [str(one.message) for one in said if issubclass(one.category, RuntimeWarning)]
    assert str(error)[:60] in message and "computed by reference from now on, not by triton" in message
    driver.fail = lambda _: None  # it would work now, and is not tried again
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for results in (found, call(), call()):
            assert all(map(torch.equal, results, expected))
    assert not driver.launches
    if call is functional:
        assert not verdict().accepted and str(error)[:60] in verdict().reason


@EACH
@pytest.mark.parametrize("name", ERRORS)
def test_the_one_asked_for_by_name_raises(call: Callable[..., Tensors], name: str, driver: FakeDriver) -> None:
    where, error = ERRORS[name]
    failing(driver, where, error)
    says = r"implementation='triton' cannot compute this: Triton could not .* implementation=None would take reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for turn in range(2):
            with pytest.raises(UnsupportedError, match=says) as raised:
                call(implementation="triton")
            if not turn:
                assert isinstance(raised.value.__cause__, LaunchError)
                assert raised.value.__cause__.__cause__ is error or isinstance(error, OutOfResources)
    assert not driver.launches


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), "ptxas"])
def test_a_kernel_that_cannot_be_compiled(
    error: Any, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.errors import PTXASError

    raised = PTXASError("`ptxas` failed with error code 255") if error == "ptxas" else error

    def refuse(*_: Any) -> None:
        raise raised

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CUDABackend, "make_cubin", refuse)
    with pytest.warns(RuntimeWarning, match="could not compile and load forward_rows"):
        found = functional()
    assert all(map(torch.equal, found, functional(implementation="reference")))


def test_triton_that_cannot_be_imported(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    import normkit

    with monkeypatch.context() as patched:
        patched.delattr(normkit, "kernels", raising=False)
        patched.setitem(sys.modules, "normkit.kernels", None)
        with pytest.warns(RuntimeWarning, match="could not be imported to launch forward_rows"):
            found = functional()
    assert all(map(torch.equal, found, functional(implementation="reference")))


@pytest.mark.parametrize("call", [functional, in_place, into], ids=lambda call: call.__name__)
def test_a_prepared_call_that_fails_once_is_launched_again(call: Callable[..., Tensors], driver: FakeDriver) -> None:
    call()
    call()
    failing(driver, "launch", RuntimeError("for a moment"), times=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for count in (3, 4):
            call()
            assert len(driver.launches) == count


@pytest.mark.parametrize("call", [functional, in_place, into, gradient], ids=lambda call: call.__name__)
def test_a_prepared_call_that_fails_goes_on_with_the_next(call: Callable[..., Tensors], driver: FakeDriver) -> None:
    call()
    call()
    driver.launches.clear()
    failing(driver, "launch", RuntimeError("from now on"))
    with pytest.warns(RuntimeWarning, match="from now on"):
        results = call()
    expected = call(implementation="reference")
    assert all(map(torch.equal, results, expected)) and all(map(torch.equal, call(), expected))
    assert not driver.launches
    assert not [ready for alike in prepared._calls.values() for ready in alike if ready.problem.platform == "cuda"]


@pytest.mark.parametrize("named", [None, "triton"])
def test_a_backward_pass_that_cannot_be_launched(named: str | None, driver: FakeDriver) -> None:
    leaves = [leaf.requires_grad_() for leaf in (rows(5, HIDDEN), rows(HIDDEN, seed=2))]
    dy = rows(5, HIDDEN, seed=3)
    expected = torch.autograd.grad(normkit_torch.rms_norm(*leaves, implementation="reference"), leaves, dy)
    y = normkit_torch.rms_norm(*leaves, implementation=named)
    assert [launch.kernel for launch in driver.launches] == ["forward_rows"]
    saved: Any = y.grad_fn
    rstd = (leaves[0].detach().float().square().mean(-1) + 1e-6).rsqrt()
    saved.saved_tensors[3].data.copy_(rstd)  # what a kernel would have computed
    failing(driver, "launch", RuntimeError("too many registers"))
    if named:
        with pytest.raises(UnsupportedError, match="too many registers"):
            torch.autograd.grad(y, leaves, dy)
    else:
        with pytest.warns(RuntimeWarning, match="could not launch backward_rows: RuntimeError: too many registers; calls"):
            found = torch.autograd.grad(y, leaves, dy)
        assert all(map(torch.equal, found, expected))


def test_kernels_that_differ_are_not_set_aside(driver: FakeDriver) -> None:
    failing(driver, "launch", RuntimeError("no"), times=1)
    with pytest.warns(RuntimeWarning, match="no; calls like this one"):
        normkit_torch.rms_norm(rows(5, HIDDEN))
    normkit_torch.rms_norm(rows(7, HIDDEN), eps=1e-3)
    assert not driver.launches, "the number of rows and eps make no other kernel"
    normkit_torch.layer_norm(rows(5, HIDDEN))
    normkit_torch.rms_norm(rows(5, 2 * HIDDEN))
    normkit_torch.rms_norm(rows(5, HIDDEN).float())
    assert len(driver.launches) == 3


@pytest.mark.parametrize(
    "error", [TypeError("an argument"), KeyError("enable_fp_fusion"), ValueError("cpu tensor?"), IndexError()]
)
@pytest.mark.parametrize("call", [functional, in_place, into, gradient, strided], ids=lambda call: call.__name__)
def test_errors_of_our_own_are_raised_as_they_are(call: Callable[..., Tensors], error: Exception, driver: FakeDriver) -> None:
    failing(driver, "launch", error)
    for _ in range(2):
        with pytest.raises(type(error)):
            call()
    driver.fail = lambda _: None
    call()
    failing(driver, "launch", error)
    with pytest.raises(type(error)):
        call()


def test_nothing_was_written_before_the_next_implementation_writes(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    from normkit import reference

    seen = []
    original = reference.forward_

    def forward_(problem: Problem, x: Tensor, residual: Tensor, *rest: Any) -> None:
        seen.append((x.clone(), residual.clone()))
        original(problem, x, residual, *rest)

    monkeypatch.setattr(reference, "forward_", forward_)
    failing(driver, "launch", RuntimeError("no"))
    with pytest.warns(RuntimeWarning):
        in_place()
    ((x, residual),) = seen
    assert torch.equal(x, rows(5, HIDDEN)) and torch.equal(residual, rows(5, HIDDEN, seed=1))


class _Refusing:
    """An implementation that fails and still accepts."""

    def supports(self, _: Problem) -> None:
        return None


def test_an_implementation_that_fails_and_still_accepts_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "normkit_refusing", _Refusing())
    table = [Implementation("refusing", "normkit_refusing"), Implementation("reference", "normkit.reference")]
    problem = describe(NormSpec("rms"), Operand((4, 64), "float32"))
    tried = []

    def run(kernels: Kernels) -> None:
        tried.append(kernels)
        raise LaunchError("it cannot")

    with pytest.raises(LaunchError, match="it cannot"):
        registry.compute(problem, table, None, run)
    assert len(tried) == 1
    with pytest.raises(OptionError):
        registry.compute(problem, table, "refusin", run)
