# SPDX-License-Identifier: Apache-2.0
"""A backward pass like one before goes straight to its kernels, which are told of its own tensors; nothing is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from .at_once import at_once
from .fake_driver import DEVICE, OTHER_DEVICE, FakeDriver

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

import torch
from torch import Tensor

from normkit import registry
from normkit.interface import Wanted
from normkit_torch import allocate, dispatch, failures, launch_backward, prepared

from .launch_calls import BF16, HIDDEN, rows
from .launch_passes import F32, LONG, NAMES, Pass, only_the_short_way, shapes

WRITTEN = ("dx_ptr", "dresidual_ptr", "total_ptr")
HIDDEN_SIZES = pytest.mark.parametrize("hidden", [HIDDEN, LONG])


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The platforms of passes that were described and chosen for."""
    seen: list[str] = []
    original = registry.select

    def noting(problem: Any, *rest: Any) -> Any:
        seen.append(problem.layout)
        return original(problem, *rest)

    monkeypatch.setattr(registry, "select", noting)
    return seen


@HIDDEN_SIZES
def test_the_second_pass_is_launched_at_once_on_its_own_tensors(hidden: int, driver: FakeDriver) -> None:
    first = Pass(driver, hidden=hidden)
    with only_the_short_way():
        second, third = Pass(driver, hidden=hidden), Pass(driver, hidden=hidden)
    kernels = ["backward_rows"] if hidden == HIDDEN else ["backward_columns", "backward_long"]
    assert [one.kernel for one in first.launches] == [*kernels, "sum_partials", "sum_partials"]
    assert shapes(first.launches) == shapes(second.launches) == shapes(third.launches)
    for one in (first, second, third):
        one.assert_told()
    told = [{one.launches[0].arguments[f"{name}_ptr"] for name in ("dy", "h", "rstd")} for one in (first, second, third)]
    assert not told[0] & told[1] and not told[1] & told[2]


@HIDDEN_SIZES
def test_sums_are_in_memory_that_is_no_one_elses(hidden: int, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    original = allocate.maker

    def maker(*arguments: Any) -> Callable[[], Tensor]:
        new = original(*arguments)

        def noting() -> Tensor:
            made.append(new())
            return made[-1]

        return noting

    monkeypatch.setattr(allocate, "maker", maker)
    Pass(driver, hidden=hidden)
    for _ in range(2):
        made.clear()
        found = Pass(driver, hidden=hidden)
        by_address = {tensor.data_ptr(): tensor for tensor in made}
        sums, last = found.launches[0].arguments, found.launches[-1].arguments
        for name in ("dweight", "dbias"):
            tensor = by_address[sums[f"{name}_ptr"]]
            assert tensor.dtype == F32 and tensor.shape == (last["programs"], hidden)
        if hidden == LONG:
            for name in ("x_hat_g", "g"):
                tensor = by_address[sums[f"{name}_ptr"]]
                assert tensor.dtype == F32 and tensor.shape == (8, found.launches[1].arguments["BLOCKS"])


WAYS: dict[str, dict[str, Any]] = {
    "another number of rows": {"count": 9},
    "another dtype": {"dtypes": (BF16, F32)},
    "fewer gradients": {"asks": ("x", "weight")},
    "no gradient of x": {"asks": ("weight", "bias")},
    "rows apart": {"change": lambda dy: rows(len(dy), hidden=HIDDEN + 16)[:, :HIDDEN]},
    "an expanded dy": {"change": lambda dy: dy[:1].expand(dy.shape)},
    "statistics that a hook lays out otherwise": {
        "pack": lambda saved: saved.repeat_interleave(2)[::2] if saved.dtype == F32 else saved
    },
    "an h that a hook lays out otherwise": {
        "pack": lambda saved: saved.t().contiguous().t() if saved.shape == (8, HIDDEN) else saved
    },
}


@pytest.mark.parametrize("name", WAYS)
def test_what_is_not_like_that_goes_the_long_way(name: str, driver: FakeDriver, long_way: list[str]) -> None:
    for _ in range(2):
        Pass(driver, **{n: v for n, v in WAYS[name].items() if n in ("asks", "count", "dtypes")})
    Pass(driver)
    long_way.clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prepared, "_calls", {})  # as if none had been seen
        patched.setattr(prepared, "_latest", {})
        expected = Pass(driver, **WAYS[name])
    assert len(long_way) == 2
    found = Pass(driver, **WAYS[name])
    assert shapes(found.launches) == shapes(expected.launches)
    for one in found.launches[:1]:
        assert one.arguments["dy_ptr"] == found.dy.data_ptr()
    statistics = [tensor for tensor in found.saved if tensor.dtype == F32 and tensor.dim() == 1]
    told = [found.launches[0].arguments[f"{name}_ptr"] for name in ("mean", "rstd")]
    assert (told == [tensor.data_ptr() for tensor in statistics]) == all(t.is_contiguous() for t in statistics)


def test_what_is_asked_has_its_own_launches(driver: FakeDriver) -> None:
    asked = {asks: Pass(driver, asks=asks) for asks in (NAMES, ("x",), ("weight",), ("bias",), ("residual", "bias"))}
    with only_the_short_way():
        for asks, first in reversed(asked.items()):
            again = Pass(driver, asks=asks)
            assert shapes(again.launches) == shapes(first.launches)
            assert [one.kernel for one in again.launches].count("sum_partials") == ("weight" in asks) + ("bias" in asks)
            told = again.launches[0].arguments
            assert (told["dx_ptr"] is not None) == bool({"x", "residual"} & set(asks))
            assert [told[f"d{name}_ptr"] is not None for name in NAMES[2:]] == [name in asks for name in NAMES[2:]]
            assert len(again.gradients) == len(asks)


def test_tensors_that_are_not_aligned_have_their_own_kernels(driver: FakeDriver) -> None:
    expected = {one.kernel: one.metadata.hash for one in Pass(driver).launches}
    with only_the_short_way():
        found = Pass(driver, change=lambda dy: rows(len(dy), misaligned=True))
    assert found.launches[0].metadata.hash != expected["backward_rows"]
    assert found.launches[0].arguments["dy_ptr"] == found.dy.data_ptr()
    assert {one.metadata.hash for one in found.launches[1:]} == {expected["sum_partials"]}


def test_device_and_stream_are_those_of_the_call(driver: FakeDriver) -> None:
    for turn, where in enumerate((DEVICE, OTHER_DEVICE, DEVICE)):
        driver.move(where)
        Pass(driver)
        with only_the_short_way():
            for current in (DEVICE, OTHER_DEVICE):
                driver.device, driver.streams[where] = current, 7 + turn
                found = Pass(driver)
                assert {(one.device, one.stream) for one in found.launches} == {(where, 7 + turn)}
                assert driver.device == current


@HIDDEN_SIZES
def test_a_warm_pass_does_nothing_in_torch_but_make_memory(hidden: int, driver: FakeDriver) -> None:
    """So it can be captured in a CUDA graph."""
    wanted = Wanted(True, False, True, True)
    found = Pass(driver, hidden=hidden)
    (problem,) = {ready.problem for alike in prepared._calls.values() for ready in alike}
    start = launch_backward._ready(problem, wanted, True, found.dy.device)
    assert start is not None
    given = (found.dy, found.dresidual_out, *found.saved, found.gradients[0], None, *found.gradients[2:])
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in given)
    driver.launches.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start(addresses)
    events = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert events <= {"aten::empty_strided", "aten::empty"}
    assert shapes(driver.launches) == shapes(found.launches)
    found.launches = list(driver.launches)
    found.assert_told()


def test_threads_at_once(driver: FakeDriver) -> None:
    for count in (3, 8):
        Pass(driver, count)
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(30):
            count = (3, 8)[(number + turn) % 2]
            found = Pass(driver, count)
            sums = [one.arguments for one in found.launches if one.arguments.get("dy_ptr") == found.dy.data_ptr()]
            told = [(one["dresidual_out_ptr"], one["dx_ptr"], one["rows"]) for one in sums]
            if (found.dresidual_out.data_ptr(), found.gradients[0].data_ptr(), count) not in told:
                wrong.append((number, turn))

    driver.launches.clear()
    with only_the_short_way():
        at_once(work)
    assert not wrong and len(driver.launches) == 8 * 30 * 4


def failing_at(driver: FakeDriver, at: int, error: Exception, times: int = 1) -> None:
    """Let the launch of that number from now fail, and as many as come after."""
    numbers = iter(range(1000))

    def fail(now: str) -> None:
        if now == "launch" and next(numbers) in range(at, at + times):
            raise error

    driver.fail = fail


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@HIDDEN_SIZES
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_pass_that_fails_once_is_launched_again(at: int, hidden: int, driver: FakeDriver) -> None:
    expected = shapes(Pass(driver, hidden=hidden).launches)
    failing_at(driver, at, RuntimeError("for a moment"))
    again = Pass(driver, hidden=hidden)
    assert shapes(again.launches[-len(expected) :]) == expected and not failures._failures._reasons
    again.launches = again.launches[-len(expected) :]
    again.assert_told()
    assert shapes(Pass(driver, hidden=hidden).launches) == expected
    with only_the_short_way():
        Pass(driver, hidden=hidden)


@HIDDEN_SIZES
def test_a_pass_that_fails_twice_goes_on_with_the_next(hidden: int, driver: FakeDriver) -> None:
    Pass(driver, hidden=hidden)
    failing_at(driver, 1, RuntimeError("from now on"), times=1000)
    with pytest.warns(
        RuntimeWarning, match="could not launch backward_.* from now on; calls like this one are computed by ref"
    ):
        found = Pass(driver, hidden=hidden)
    assert not found.launches and len(failures._failures._reasons) == 1 and len(found.gradients) == 4
    driver.fail = lambda _: None
    assert not Pass(driver, hidden=hidden).launches
    assert not [ready for alike in prepared._calls.values() for ready in alike if ready.problem.platform == "cuda"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_a_pass_without_memory_stays_prepared(error: Exception, driver: FakeDriver) -> None:
    Pass(driver)
    with only_the_short_way():
        for at in (1, 2, 3):
            failing_at(driver, at, error)
            with pytest.raises(torch.OutOfMemoryError):
                Pass(driver)
        Pass(driver).assert_told()
    assert not failures._failures._reasons


def test_forgetting(driver: FakeDriver, long_way: list[str]) -> None:
    for _ in range(2):
        Pass(driver)
    assert len(long_way) == 2
    prepared.forget()
    Pass(driver)
    assert len(long_way) == 4


@pytest.mark.parametrize("asks", [NAMES, ("x",), ("residual", "weight")])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32)])
def test_an_operator_goes_straight_to_the_kernels_too(
    asks: tuple[str, ...], dtypes: tuple[torch.dtype, torch.dtype], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Pass(driver, asks=asks, dtypes=dtypes)
    prepared.forget()
    monkeypatch.setattr(dispatch, "is_plain", lambda *_: False)
    Pass(driver, asks=asks, dtypes=dtypes)
    with only_the_short_way():
        found = Pass(driver, asks=asks, dtypes=dtypes)
    assert shapes(found.launches) == shapes(expected.launches)
    assert found.launches[0].arguments["dy_ptr"] == found.dy.data_ptr()
    for gradient, other in zip(found.gradients, expected.gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (other.shape, other.dtype)
    written = {value for one in found.launches for name, value in one.arguments.items() if name in WRITTEN}
    assert {gradient.data_ptr() for gradient in found.gradients} <= written
