# SPDX-License-Identifier: Apache-2.0
"""Kernels are started past Triton's own launch: the same, told the same, on the right device and stream; none runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from .at_once import at_once
from .fake_driver import DEVICE, OTHER_DEVICE, FakeDriver, compiled

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

import torch
from triton import JITFunction

import normkit_torch
from normkit import plan
from normkit.interface import Wanted
from normkit.spec import NormSpec, Operand, describe
from normkit_torch import jit, launch_backward, prepared, steps

from .launch_calls import BF16, EACH, HIDDEN, functional, gradient, in_place, into, parameter, rows


def not_asked(*_: Any, **__: Any) -> None:
    raise AssertionError("Triton is asked for a kernel again")


@EACH
def test_a_warm_call_does_not_ask_triton(
    call: Callable[[int], None], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(8)
    expected = [(one.kernel, one.metadata.hash) for one in driver.launches]
    monkeypatch.setattr(JITFunction, "run", not_asked)
    for count in (2, 8, 15, 16, 4096, 4097):
        driver.launches.clear()
        call(count)
        assert [(one.kernel, one.metadata.hash) for one in driver.launches] == expected


def test_no_number_of_rows_up_to_4097_asks_triton(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(1)
    monkeypatch.setattr(JITFunction, "run", not_asked)
    x, residual, weight = rows(4097), rows(4097), parameter()
    for count in range(1, 4098):
        normkit_torch.add_rms_norm_(x[:count], residual[:count], weight)
    launches = driver.launches[1:]
    assert [launch.arguments["rows"] for launch in launches] == list(range(1, 4098))
    assert [launch.grid for launch in launches] == [(-(-count // 8), 1, 1) for count in range(1, 4098)]
    assert len({launch.metadata.hash for launch in launches}) == 1
    assert {launch.arguments["x_ptr"] for launch in launches} == {x.data_ptr()}


NAMES = ("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "residual_out_ptr")


def test_each_alignment_has_its_own_kernel_in_prepared_calls_too(driver: FakeDriver) -> None:
    hashes: dict[str | None, str] = {}
    for _ in range(3):
        for misaligned in (None, *NAMES):
            x, residual, weight, out, residual_out = (rows(8, name == misaligned) for name in NAMES)
            driver.launches.clear()
            normkit_torch.add_rms_norm(x, residual, weight[0], out=out, residual_out=residual_out)
            (launch,) = driver.launches
            assert [name for name in NAMES if launch.arguments[name] % 16] == ([misaligned] if misaligned else [])
            assert hashes.setdefault(misaligned, launch.metadata.hash) == launch.metadata.hash
    assert len(set(hashes.values())) == len(NAMES) + 1
    assert len(prepared._calls) == 1
    sources = {kernel.hash: kernel.src for kernel in compiled()["forward_rows"]}
    order = list(sources[hashes[None]].signature)
    for misaligned in NAMES:
        known = {order[path[0]] for path, known in sources[hashes[misaligned]].attrs.items() if known}
        assert misaligned not in known and set(NAMES) - {misaligned} <= known


@EACH
def test_device_and_stream_are_those_of_the_call(call: Callable[[], None], driver: FakeDriver) -> None:
    """On each device, the current one or not, and on a stream that is another one at each call."""
    for turn in range(4):
        where, driver.device = [(DEVICE, DEVICE), (OTHER_DEVICE, DEVICE), (DEVICE, OTHER_DEVICE)][turn % 3]
        driver.move(where)
        current = driver.device
        for stream in (7, 8):
            driver.streams[driver.tensors_on] = stream
            driver.launches.clear()
            call()
            assert {(launch.device, launch.stream) for launch in driver.launches} == {(driver.tensors_on, stream)}
            assert driver.device == current
    assert set(driver.loaded) == {DEVICE, OTHER_DEVICE}
    assert len(driver.loaded) == sum(len(kernels) for device in driver.streams for kernels in compiled(device).values())


def test_each_device_has_its_own_kernels(driver: FakeDriver) -> None:
    _, step, _ = _kernel()
    one, other = (steps.kernel_for(step, (("x_ptr", BF16),), torch.device("cuda", index)) for index in (0, 1))
    assert one is not other and steps.kernel_for(step, (("x_ptr", BF16),), torch.device("cuda", 0)) is one
    problem = describe(NormSpec("rms"), Operand((8, HIDDEN), "bfloat16"), platform="cuda", needs_grad=True)
    wanted = Wanted(True, False, False, False)
    ready = [launch_backward._ready(problem, wanted, False, torch.device("cuda", index)) for index in (0, 1, 0)]
    assert ready[0] is ready[2] is not ready[1]


def test_threads_at_once(driver: FakeDriver) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(40):
            x, residual, weight = rows(1 + turn % 5, number % 2 == 1), rows(1 + turn % 5), parameter()
            normkit_torch.add_rms_norm_(x, residual, weight, eps=float(number))
            mine = [one.arguments for one in list(driver.launches) if one.arguments["x_ptr"] == x.data_ptr()]
            told = [(one["residual_ptr"], one["weight_ptr"], one["rows"], one["eps"]) for one in mine]
            if (residual.data_ptr(), weight.data_ptr(), len(x), float(number)) not in told:
                wrong.append((number, turn))

    at_once(work)
    assert not wrong and len(driver.launches) == 8 * 40
    assert len(compiled()["forward_rows"]) == len(driver.loaded) == 2


@pytest.mark.parametrize("call", [in_place, into, functional], ids=lambda call: call.__name__)
def test_a_warm_call_does_nothing_in_torch_but_make_its_results(call: Callable[[], None], driver: FakeDriver) -> None:
    """So it can be captured in a CUDA graph: no copy, no waiting for the device, no memory besides."""
    x, residual, out, residual_out, weight = rows(8), rows(8), rows(8), rows(8), parameter()
    calls: dict[Any, tuple[Callable[[], Any], set[str]]] = {
        in_place: (lambda: normkit_torch.add_rms_norm_(x, residual, weight), set()),
        into: (lambda: normkit_torch.add_rms_norm(x, residual, out=out, residual_out=residual_out), set()),
        functional: (
            lambda: normkit_torch.add_rms_norm(x, residual, weight),
            {"aten::empty_like", "aten::empty_strided", "aten::empty"},
        ),
    }
    warm, allowed = calls[call]
    warm()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        warm()
    assert {event.key for event in profile.key_averages() if event.key.startswith("aten::")} <= allowed


def test_numbers_are_floats_whatever_was_given(driver: FakeDriver) -> None:
    """Triton would compile a kernel for eps=1."""
    for eps in (1.0, 1, True, 1e-6):
        normkit_torch.rms_norm(rows(8), parameter(), eps=eps, weight_offset=1)
    assert all(type(launch.arguments[name]) is float for launch in driver.launches for name in ("eps", "weight_offset"))
    assert len(compiled()["forward_rows"]) == 1


def _kernel() -> tuple[jit.Kernel, plan.Step, dict[str, Any]]:
    step = plan.forward_plan(describe(NormSpec("rms"), Operand((8, HIDDEN), "bfloat16"), platform="cuda"))
    from normkit import kernels

    pointers = [name for name in kernels.forward_rows.arg_names if name.endswith("_ptr")]
    dtypes = {name: BF16 if name in ("x_ptr", "y_ptr") else None for name in pointers}
    scalars = {name: 0 for name in kernels.forward_rows.arg_names if name not in dtypes and name not in step.constants}
    return jit.Kernel(step, dtypes, torch.device("cpu")), step, scalars | {"eps": 1e-6, "weight_offset": 0.0}


def test_what_triton_may_specialise_on_is_told_apart(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, step, scalars = _kernel()
    compiled_for: list[Any] = []

    def loaded(made: object) -> jit._Compiled:
        compiled_for.append(made)
        return jit._Compiled(lambda *_: None, 0, 0, made)

    monkeypatch.setattr(jit, "_loaded", loaded)
    addresses = (16, 0, 0, 0, 16, 0, 0, 0)
    changes: list[dict[str, Any]] = [{}, {"rows": 2**31}, {"x_outer": 1}, {"x_outer": 16}, {"x_outer": 2**31}]
    for change in (*changes, *changes, {"rows": 7}, {"rows": 16}, {"eps": 1.0}):
        kernel.bind(step.grid, scalars | change, 100)(addresses)
    assert len(compiled_for) == len(changes)
    for elements in (2**29, 2**29 + 1, 2**30, 100):
        kernel.bind(step.grid, scalars, elements)(addresses)
    assert len(compiled_for) == len(changes) + 2
    # Triton, asked again for each of these, finds no more kernels than were told apart
    assert len({id(made) for made in compiled_for}) <= len(changes)


def test_a_view_of_another_stride_asks_triton_only_where_a_kernel_could_differ(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, _, scalars = _kernel()
    addresses = (16, 0, 0, 0, 16, 0, 0, 0)
    by_fact: dict[object, Any] = {}
    for stride in (0, 1, *range(2, 50), 2**31 - 1, 2**31, 2**31 + 8, 2**31 + 17, 2**31 + 32):
        values = tuple((scalars | {"x_outer": stride})[name] for name in kernel._scalars)
        made = kernel._kernel.warmup(*kernel._stand_ins(values, 100, addresses), grid=(1,), **kernel._options)
        assert by_fact.setdefault(jit._fact(stride, True), made) is made, stride
    for wide in (264, 280):
        normkit_torch.rms_norm(rows(4, hidden=wide)[:, :HIDDEN])
    monkeypatch.setattr(JITFunction, "run", not_asked)
    for wide in (280, 296, 312, 1048):
        normkit_torch.rms_norm(rows(4, hidden=wide)[:, :HIDDEN])
    assert [launch.arguments["x_outer"] for launch in driver.launches[-4:]] == [280, 296, 312, 1048]


def test_kernels_that_are_forgotten_are_found_again(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_MOST", 2)
    monkeypatch.setattr(steps, "MOST", 2)
    for _ in range(2):
        for hidden in (64, 128, 192, 256):
            for misaligned in (False, True):
                normkit_torch.rms_norm(rows(4, misaligned, hidden))
            gradient(4, hidden)
        assert len(steps._kernels) <= 2 and len(launch_backward._backwards) <= 2
    assert len(driver.loaded) == sum(map(len, compiled().values()))


def test_rows_that_change_find_their_kernels_in_order(driver: FakeDriver) -> None:
    for count in (1, 3, 1, 3):
        gradient(count)
    kernels = [launch.kernel for launch in driver.launches]
    assert kernels == ["forward_rows", "backward_rows", "sum_partials"] * 4
    of_rows = [launch.arguments["rows"] for launch in driver.launches if "rows" in launch.arguments]
    assert of_rows == [1, 1, 3, 3] * 2 and all(one is not other for one, other in pairwise(driver.launches))
