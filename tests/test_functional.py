# SPDX-License-Identifier: Apache-2.0
"""Every registered implementation, in every framework, on every case, forward and backward, within the derived bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from normkit.errors import UnsupportedError
from normkit.tolerance import expected_backward, expected_forward, worst

from .cases import Case, tagged
from .conftest import Ledger
from .frameworks import Framework, installed

FRAMEWORKS = installed()


def _parameters() -> Iterator[Any]:
    on_device = getattr(FRAMEWORKS.get("torch"), "device", "cpu") != "cpu"
    for framework in FRAMEWORKS.values():
        for entry in framework.table:
            for case in tagged("gpu" if on_device and framework.name == "torch" else "ci"):
                yield pytest.param(framework, entry.name, case, id=f"{framework.name}-{entry.name}-{case.name}")


EVERYTHING = pytest.mark.parametrize(("framework", "implementation", "case"), list(_parameters()))


@pytest.fixture(autouse=True)
def _x64(request: pytest.FixtureRequest) -> Iterator[None]:
    """float64 exists in JAX only where it is asked for."""
    parameters = request.node.callspec.params
    if parameters["framework"].name == "jax" and "float64" in parameters["case"].problem().dtypes:
        import jax

        with jax.enable_x64(True):
            yield
    else:
        yield


def accepts(framework: Framework, implementation: str, case: Case, arrays: dict[str, Any], ledger: Ledger) -> bool:
    """Whether an implementation takes a case; if not, check that asking for it by name raises its reason."""
    names = ("x", "residual", "weight", "bias") if case.function.startswith("add_") else ("x", "weight", "bias")
    operands = [arrays[name] for name in names]
    verdicts = {v.name: v for v in framework.front_end.explain(case.function, *operands, **case.options)}
    verdict = verdicts[implementation]
    if verdict.accepted or "only by name" in verdict.reason:
        return True
    with pytest.raises(UnsupportedError) as error:
        framework.call(case, arrays, implementation)
    assert verdict.reason in str(error.value)
    ledger.refused(framework.name, implementation, verdict.reason)
    return False


def has_backward(framework: Framework, implementation: str) -> bool:
    return hasattr(next(entry for entry in framework.table if entry.name == implementation).load(), "backward")


def refuses_gradients(framework: Framework, implementation: str, case: Case, arrays: dict[str, Any]) -> None:
    """Check that an implementation without a backward pass refuses where one may follow."""
    if framework.name != "numpy":
        with pytest.raises(UnsupportedError, match="no backward pass, and a gradient is asked for"):
            framework.gradients(case, arrays, implementation)


@EVERYTHING
def test_forward(framework: Framework, implementation: str, case: Case, ledger: Ledger, selected: list[str]) -> None:
    given = case.arrays()
    arrays = {name: framework.array(array) for name, array in given.items()}
    if not accepts(framework, implementation, case, arrays, ledger):
        return
    selected.clear()
    y, residual_out = framework.call(case, arrays, implementation)
    assert set(selected) == {implementation}
    ledger.ran(framework.name, implementation, "forward")
    if case.function.startswith("add_") and case.problem().residual_out_dtype is None:
        assert residual_out is arrays["x"]
    operands = {name: given[name] for name in ("x", "residual", "weight", "bias")}
    actual_y, actual_residual_out = framework.numpy(y), framework.numpy(residual_out)
    expected_y, expected_residual_out = expected_forward(case.problem(), **operands, residual_out=actual_residual_out)
    assert actual_y is not None
    assert actual_y.dtype == case.problem().out_dtype
    assert worst(actual_y, expected_y) <= 1
    if actual_residual_out is not None:
        assert actual_residual_out.dtype == case.problem().h_dtype
        assert worst(actual_residual_out, expected_residual_out) <= 1
    _assert_unchanged(framework, given, arrays)


@EVERYTHING
def test_backward(framework: Framework, implementation: str, case: Case, ledger: Ledger) -> None:
    given = case.arrays()
    arrays = {name: framework.array(array) for name, array in given.items()}
    if not accepts(framework, implementation, case, arrays, ledger):
        return
    if not has_backward(framework, implementation):
        refuses_gradients(framework, implementation, case, arrays)
        return
    residual_out, gradients = framework.gradients(case, arrays, implementation)
    ledger.ran(framework.name, implementation, "backward")
    h = given["x"] if residual_out is None else framework.numpy(residual_out)
    expected = expected_backward(case.problem(), given["dy"], given["dresidual_out"], h, given["weight"])
    for name in ("x", "residual", "weight", "bias"):
        if given[name] is not None:
            gradient, operand = framework.numpy(gradients[name]), given[name]
            assert gradient is not None
            assert operand is not None
            assert gradient.dtype == operand.dtype
            assert worst(gradient, expected[f"d{name}"]) <= 1, name
    _assert_unchanged(framework, given, arrays)


def _assert_unchanged(framework: Framework, given: dict[str, Any], arrays: dict[str, Any]) -> None:
    for name, array in given.items():
        if array is not None:
            after = framework.numpy(arrays[name])
            assert after is not None
            assert np.array_equal(array, after), f"{name} was changed"
