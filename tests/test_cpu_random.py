# SPDX-License-Identifier: Apache-2.0
"""Ten thousand random calls of the CPU kernels: any shape, strides, alignment, dtypes and options, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from .cpu_calls import Call, Setting, calls, check, set_up
from .cpu_operands import COMPILED

pytestmark = COMPILED


@pytest.fixture
def setting() -> Iterator[Setting]:
    with set_up() as made:
        yield made


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(call=calls())
def test_random_calls_are_within_the_bounds(call: Call, setting: Setting) -> None:
    check(call, setting)
