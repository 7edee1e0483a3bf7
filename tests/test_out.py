# SPDX-License-Identifier: Apache-2.0
"""Arrays given to write to have the bits of those returned otherwise, are returned themselves, and nothing else changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import normkit
from normkit import DtypeError

from .cases import NumpyArray
from .frameworks import Framework, installed

FRAMEWORKS = {name: framework for name, framework in installed().items() if name != "jax"}
EACH = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
FUNCTIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}
SHAPE = (4, 6, 24)
Buffers = dict[str, Any]


def arrays_of(framework: Framework, function: str, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> list[Any]:
    """The arrays that a function takes, in order."""
    rng = np.random.default_rng(3)
    shapes = (shape, shape, shape[-1:], shape[-1:])
    given = [framework.array(rng.standard_normal(shape).astype(DTYPES[dtype])) for shape in shapes]
    return given if function.startswith("add_") else [given[0], *given[2:]]


def empty(framework: Framework, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> Any:
    return framework.array(np.full(shape, 7, DTYPES[dtype]))


def tuple_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def bits(framework: Framework, array: Any) -> NumpyArray:
    found = np.ascontiguousarray(framework.numpy(array))
    return found.view(f"u{found.itemsize}")


def assert_written(framework: Framework, function: str, arrays: list[Any], buffers: Buffers, **options: Any) -> None:
    """Compare with the functional form; inputs stay as they are, and only what is given is returned as it is."""
    before = [None if array is None else bits(framework, array).copy() for array in arrays]
    call = getattr(framework.front_end, function)
    expected = tuple_of(call(*arrays, **options))
    found = tuple_of(call(*arrays, **options, **buffers))
    for name, one, other in zip(("out", "residual_out"), found, expected, strict=False):
        np.testing.assert_array_equal(bits(framework, one), bits(framework, other), err_msg=name)
        assert one is buffers.get(name, one), name
        assert one.dtype == other.dtype and one.shape == other.shape
    for array, own in zip(arrays, before, strict=True):
        if own is not None:
            np.testing.assert_array_equal(bits(framework, array), own, err_msg="an input was changed")


def implementations() -> Iterator[Any]:
    for framework in FRAMEWORKS.values():
        for entry in framework.table:
            yield pytest.param(framework, entry.name, id=f"{framework.name}-{entry.name}")


IMPLEMENTATIONS = pytest.mark.parametrize(("framework", "implementation"), list(implementations()))


@IMPLEMENTATIONS
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation_writes_what_it_returns(
    framework: Framework, implementation: str, function: str, dtype: str, selected: list[str]
) -> None:
    arrays = arrays_of(framework, function, dtype)
    names = ("out", "residual_out") if function.startswith("add_") else ("out",)
    buffers = {name: empty(framework, dtype) for name in names}
    verdict = {v.name: v for v in framework.front_end.explain(function, *arrays, **buffers)}[implementation]
    if not verdict.accepted:
        pytest.skip(verdict.reason)
    assert_written(framework, function, arrays, buffers, implementation=implementation)
    for name in buffers:
        assert_written(framework, function, arrays, {name: empty(framework, dtype)}, implementation=implementation)
    assert set(selected) == {implementation}


# Within a larger array of 7s, of which only the view may change.
VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "columns of a wider array": ((4, 6, 30), lambda whole: whole[..., 3:27]),
    "every second row": ((4, 12, 24), lambda whole: whole[:, ::2]),
    "every second column": ((4, 6, 48), lambda whole: whole[..., ::2]),
    "one of three packed": ((4, 6, 3, 24), lambda whole: whole[:, :, 1]),
    "rows in another order": ((6, 4, 24), lambda whole: whole.swapaxes(0, 1)),
    "along the row in another order": ((24, 6, 4), lambda whole: whole.swapaxes(0, 2)),
    "at an odd place": ((4, 7, 24), lambda whole: whole.reshape(-1)[1 : 1 + 576].reshape(SHAPE)),
}
NEGATIVE: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "rows reversed": (SHAPE, lambda whole: whole[:, ::-1]),
    "columns reversed": (SHAPE, lambda whole: whole[..., ::-1]),
}


@EACH
@pytest.mark.parametrize("view", [*VIEWS, *NEGATIVE])
@pytest.mark.parametrize("function", ["add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("view_of_x", [False, True])
def test_views_are_written_where_they_lie(framework: Framework, view: str, function: str, view_of_x: bool) -> None:
    if framework.name == "torch" and view in NEGATIVE:
        pytest.skip("torch has no negative strides")
    shape, take = (VIEWS | NEGATIVE)[view]
    arrays = arrays_of(framework, function)
    if view_of_x:
        wide = framework.array(np.random.default_rng(5).standard_normal(shape).astype(np.float32))
        arrays[0] = take(wide)
    for viewed in (("out",), ("residual_out",), ("out", "residual_out")):
        whole = {name: empty(framework, shape=shape) for name in viewed}
        buffers = {name: take(whole[name]) if name in viewed else empty(framework) for name in ("out", "residual_out")}
        assert_written(framework, function, arrays, buffers)
        for name in viewed:
            buffers[name][...] = 7
            assert (np.asarray(framework.numpy(whole[name])) == 7).all(), "written beside the view"


@EACH
@pytest.mark.parametrize("function", ["add_rms_norm", "add_layer_norm"])
def test_without_a_residual_x_is_copied(framework: Framework, function: str) -> None:
    x, _, weight, bias = arrays_of(framework, function)
    buffers = {"residual_out": empty(framework)}
    assert_written(framework, function, [x, None, weight, bias], buffers)
    assert getattr(framework.front_end, function)(x, None, out=empty(framework))[1] is x
    wider = {"residual_out": empty(framework, "float16"), "out": empty(framework)}
    assert_written(framework, function, [x, None, weight, bias], wider, residual_dtype="float16")


@EACH
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (24,), (3, 1), (2, 0, 5)])
def test_shapes(framework: Framework, shape: tuple[int, ...]) -> None:
    for function in FUNCTIONS[2:]:
        buffers = {name: empty(framework, shape=shape) for name in ("out", "residual_out")}
        assert_written(framework, function, arrays_of(framework, function, shape=shape), buffers)


@EACH
def test_dtypes_that_are_asked_for(framework: Framework) -> None:
    arrays = arrays_of(framework, "add_rms_norm", "bfloat16")
    buffers = {"out": empty(framework, "float16"), "residual_out": empty(framework, "float32")}
    assert_written(framework, "add_rms_norm", arrays, buffers, out_dtype="float16", residual_dtype="float32")


@EACH
def test_neighbours_in_one_buffer(framework: Framework) -> None:
    """out, residual_out and x are the three parts of each row of one array."""
    for function in FUNCTIONS[2:]:
        arrays = arrays_of(framework, function)
        packed = empty(framework, shape=(4, 6, 72))
        packed[..., 48:] = arrays[0]
        arrays[0] = packed[..., 48:]
        assert_written(framework, function, arrays, {"out": packed[..., :24], "residual_out": packed[..., 24:48]})


def test_bytes_and_alignment_of_any_kind() -> None:
    framework = FRAMEWORKS["numpy"]
    odd = np.empty(4 * 6 * 24 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(SHAPE)
    records = np.zeros((4, 6), np.dtype([("a", "u1"), ("y", "f4", (24,))]))
    for out in (odd, records["y"], np.empty(SHAPE, ">f4")):
        buffers: Buffers = {"out": out, "residual_out": np.empty(SHAPE, ">f4")}
        arrays = arrays_of(framework, "add_rms_norm")
        expected = normkit.add_rms_norm(*arrays)
        found = normkit.add_rms_norm(*arrays, **buffers)
        for one, other, buffer in zip(found, expected, buffers.values(), strict=True):
            assert one is buffer
            np.testing.assert_array_equal(one, other)
    assert not records["a"].any()


# The interface


def test_the_front_ends_differ_in_just_this() -> None:
    """JAX's arrays never change, so that its functions have nothing to write to."""
    outputs = {"out", "residual_out"}
    for name in FUNCTIONS:
        expected = list(inspect.signature(getattr(normkit, name)).parameters)
        assert outputs & set(expected) == (outputs if name.startswith("add_") else {"out"})
        for front_end in (framework.front_end for framework in installed().values()):
            found = inspect.signature(getattr(front_end, name)).parameters
            in_jax = front_end.__name__ == "normkit_jax"
            assert list(found) == [option for option in expected if not (in_jax and option in outputs)]


def test_explain_takes_the_same_arguments() -> None:
    for framework in FRAMEWORKS.values():
        for function in FUNCTIONS:
            arrays = arrays_of(framework, function)
            verdicts = framework.front_end.explain(function, *arrays, out=empty(framework))
            assert verdicts == normkit.explain(function, *arrays)
            with pytest.raises(DtypeError, match=r"^out"):
                normkit.explain(function, *arrays, out=empty(framework, "float16"))
