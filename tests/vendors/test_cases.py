# SPDX-License-Identifier: Apache-2.0
"""The cases that a vendor accepts, from every framework, eager and compiled: the same bits everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from ..cases import Case, tagged
from ..frameworks import Framework, installed
from .vendor import MODULE, NAME

FRAMEWORKS = installed()


def computed(framework: Framework, case: Case, jitted: bool = False) -> list[Any]:
    arrays = {name: framework.array(array) for name, array in case.arrays().items()}
    call: Any = partial(framework.call, case, implementation=NAME)
    results = (jax.jit(call) if jitted else call)(arrays)
    return [framework.numpy(result) for result in results]


@pytest.mark.parametrize("case", tagged("ci"), ids=lambda case: case.name)
def test_torch_jax_and_numpy_give_the_same_bits(case: Case) -> None:
    if MODULE.supports(case.problem()):
        pytest.skip("refused, with a reason, in tests/test_functional.py")
    expected = computed(FRAMEWORKS["torch"], case)
    for found in (
        computed(FRAMEWORKS["numpy"], case),
        computed(FRAMEWORKS["jax"], case),
        computed(FRAMEWORKS["jax"], case, True),
    ):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
