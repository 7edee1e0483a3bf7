# SPDX-License-Identifier: Apache-2.0
"""The table of cases, every short row and random calls, in arrays that end where their memory ends.

Fresh memory holds NaN, for which tests/test_cpu_sanitizers.py asks: what is read before it is written spoils the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings

from normkit.cpu import library

from ..cases import Case, tagged
from ..cpu_calls import LEVELS, Call, Layout, Setting, calls, check, set_up
from ..cpu_operands import DTYPES

ALL = (True,) * 4
NAMES = ("x", "residual", "weight", "bias", "dy", "dresidual_out")
CASES = [case for case in tagged("ci") if library.supports(case.problem()) is None]
EACH_LEVEL = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture
def setting() -> Iterator[Setting]:
    with set_up() as made:
        yield made


def check_on_a_thread(call: Call, setting: Setting) -> None:
    """Check a call on a thread of its own, whose scratch memory is as long as this call needs it."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            check(call, setting)
        except BaseException as error:  # noqa: BLE001 - raised again below
            raised.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@EACH_LEVEL
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case: Case, level: int, setting: Setting) -> None:
    for layout, threads in ((Layout(), 1), (Layout(offset=1, gap=3), 3)):
        check_on_a_thread(Call(case, dict.fromkeys(NAMES, layout), 0, level, threads, ALL, False), setting)


@EACH_LEVEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_every_short_row(kind: str, dtype: str, level: int, setting: Setting) -> None:
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    for hidden, dtypes in itertools.product(range(1, 99), ((dtype,) * 4, (dtype, other, other, dtype))):
        x, residual, weight, bias = dtypes
        case = Case("short", kind, (2, hidden), x=x, residual=residual, weight=weight, bias=bias)
        check(Call(case, dict.fromkeys(NAMES, Layout()), hidden, level, 1, ALL, hidden % 3 == 0), setting)


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=calls())
def test_random_calls(call: Call, setting: Setting) -> None:
    check_on_a_thread(call, setting)
