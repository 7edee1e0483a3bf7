# SPDX-License-Identifier: Apache-2.0
"""Arrays that cannot be written to are refused, and every array of the call stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import normkit
from normkit import DeviceError, DtypeError, NormkitError, OptionError, ShapeError, UnsupportedError

from .frameworks import Framework, installed
from .test_out import EACH, FRAMEWORKS, SHAPE, Buffers, arrays_of, bits, empty

BOTH = pytest.mark.parametrize("function", ["add_rms_norm", "add_layer_norm"])


def refused(
    framework: Framework, error: type[NormkitError], match: str, function: str, arrays: list[Any], buffers: Buffers
) -> None:
    """Assert the error, and that no array and no version of a tensor has changed."""
    given = [array for array in (*arrays, *buffers.values()) if hasattr(array, "dtype") and str(array.device) != "meta"]
    before = [(bits(framework, array).copy(), getattr(array, "_version", None)) for array in given]
    with pytest.raises(error, match=match) as caught:
        getattr(framework.front_end, function)(*arrays, **buffers)
    assert isinstance(caught.value, NormkitError) and isinstance(caught.value, (ValueError, TypeError))
    for array, (own, version) in zip(given, before, strict=True):
        assert np.array_equal(bits(framework, array), own)
        assert getattr(array, "_version", None) == version


def _sharing(place: int) -> Callable[[Framework, list[Any]], Any]:
    """Return a function that makes a buffer one row of which is the weight or bias of a call."""

    def make(framework: Framework, arrays: list[Any]) -> Any:
        buffer = empty(framework)
        arrays[place] = buffer[1, 2]
        return buffer

    return make


class Bad(NamedTuple):
    """An error, what it says, and the arguments that raise it, made from a framework and the arrays of a call."""

    error: type[NormkitError]
    says: str
    make: Callable[[Framework, list[Any]], Buffers]


def _overlapping(framework: Framework, shift: int) -> Buffers:
    out = (both := empty(framework, shape=(7, 6, 24)))[:4]
    return {"out": out, "residual_out": both[shift : shift + 4] if shift else out}


BAD = {
    "one that would broadcast": Bad(
        ShapeError, r"^out must have the shape of x, \(4, 6, 24\); got \(1, 6, 24\)", lambda f, _: {"out": empty(f)[:1]}
    ),
    "as many elements": Bad(
        ShapeError, "^residual_out must .* not resized", lambda f, _: {"residual_out": empty(f, shape=(24, 24))}
    ),
    "another dtype for y": Bad(
        DtypeError, "^out .*float32; got float16.* set out_dtype='float16'", lambda f, _: {"out": empty(f, "float16")}
    ),
    "another dtype for residual_out": Bad(
        DtypeError, "^residual_out .* set residual_dtype='float64'", lambda f, _: {"residual_out": empty(f, "float64")}
    ),
    "no float": Bad(
        DtypeError, "^out .*float32; got int32: give one of float32$", lambda f, _: {"out": f.array(np.ones(SHAPE, np.int32))}
    ),
    "no array": Bad(DtypeError, "^residual_out must be .*list", lambda *_: {"residual_out": [7.0]}),
    "x": Bad(OptionError, "^out is written to, and must not share memory with x;", lambda _, a: {"out": a[0]}),
    "one for both": Bad(OptionError, "^out and residual_out .* give two", lambda f, _: _overlapping(f, 0)),
    "a view of the residual": Bad(
        OptionError, "^residual_out .* with residual;", lambda _, a: {"residual_out": a[1].reshape(24, 24).reshape(SHAPE)}
    ),
    "around the weight": Bad(OptionError, "^out .* with weight;", lambda f, a: {"out": _sharing(2)(f, a)}),
    "around the bias": Bad(OptionError, "^residual_out .* with bias;", lambda f, a: {"residual_out": _sharing(3)(f, a)}),
    "overlapping each other": Bad(OptionError, "^out .* with residual_out;", lambda f, _: _overlapping(f, 3)),
}


@EACH
@BOTH
@pytest.mark.parametrize("name", BAD)
def test_refused(framework: Framework, function: str, name: str, selected: list[str]) -> None:
    arrays, bad = arrays_of(framework, function), BAD[name]
    buffers = bad.make(framework, arrays)
    refused(framework, bad.error, bad.says, function, arrays, buffers)
    if bad.error is not OptionError:
        refused(framework, bad.error, bad.says, function, arrays, buffers | {"out": buffers.get("out", empty(framework))})
    assert not selected, "nothing may be chosen, let alone run, for a call that is wrong"


@EACH
@pytest.mark.parametrize("function", ["rms_norm", "layer_norm"])
def test_x_as_out_where_there_is_no_form_in_place(framework: Framework, function: str) -> None:
    arrays = arrays_of(framework, function)
    refused(framework, OptionError, "^out .* with x; give another", function, arrays, {"out": arrays[0]})
    with pytest.raises(TypeError, match="residual_out"):
        getattr(framework.front_end, function)(*arrays, residual_out=empty(framework))


@BOTH
def test_read_only_arrays_and_elements_in_several_places_in_numpy(function: str) -> None:
    framework = FRAMEWORKS["numpy"]
    arrays = arrays_of(framework, function)
    read_only = empty(framework)
    read_only.flags.writeable = False
    repeated = np.lib.stride_tricks.as_strided(empty(framework), SHAPE, (0, 96, 4))
    shifted = np.lib.stride_tricks.as_strided(empty(framework), SHAPE, (576, 96, 3))
    for name in ("out", "residual_out"):
        refused(framework, OptionError, f"^{name} .* read-only", function, arrays, {name: read_only})
        for several in (repeated, shifted):
            refused(framework, OptionError, f"^{name} .* several elements in one place", function, arrays, {name: several})


@BOTH
def test_elements_in_several_places_in_torch(function: str) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    for several in (torch.empty(24).expand(SHAPE), torch.empty(700).as_strided(SHAPE, (24, 24, 1))):
        for name in ("out", "residual_out"):
            match = f"^{name} .* several elements in one place.* use {function}_"
            refused(framework, OptionError, match, function, arrays_of(framework, function), {name: several})


@BOTH
@pytest.mark.parametrize("operand", range(6))
def test_a_gradient(function: str, operand: int) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    arrays = arrays_of(framework, function)
    buffers = {name: empty(framework) for name in ("out", "residual_out")}
    (*arrays, *buffers.values())[operand].requires_grad_()
    name = ("x", "residual", "weight", "bias", *buffers)[operand]
    match = f"^gradients .* and {name} requires one: do without out= and residual_out=, or use torch.no_grad"
    refused(framework, OptionError, match, function, arrays, buffers)
    with torch.no_grad():
        getattr(framework.front_end, function)(*arrays, **buffers)


@BOTH
def test_transforms(function: str) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    arrays, out = arrays_of(framework, function), empty(framework)
    with pytest.raises(UnsupportedError, match=r"^out= cannot be used under torch.func"):
        torch.func.vmap(lambda x, residual: getattr(framework.front_end, function)(x, residual, out=out))(*arrays[:2])
    assert (out == 7).all()


@BOTH
def test_tensors_of_inference_mode(function: str) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    with torch.inference_mode():
        out = torch.full(SHAPE, 7.0)
    with pytest.raises(OptionError, match=r"^out is written to, and it comes from torch.inference_mode"):
        getattr(framework.front_end, function)(*arrays_of(framework, function), out=out)
    assert (out == 7).all()


@BOTH
def test_another_device_and_another_framework(function: str) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    arrays = arrays_of(framework, function)
    refused(framework, DeviceError, "^out is on meta", function, arrays, {"out": torch.empty(SHAPE, device="meta")})
    for needs_grad in (False, True):
        arrays[0].requires_grad_(needs_grad)
        with pytest.raises(
            OptionError if needs_grad else DtypeError, match=r"^gradients|^out must be a torch.Tensor, got numpy"
        ):
            getattr(framework.front_end, function)(*arrays, out=np.empty(SHAPE, np.float32))
    with pytest.raises(DtypeError, match=r"^out must be a NumPy array like x, got torch.Tensor"):
        getattr(normkit, function)(*arrays_of(FRAMEWORKS["numpy"], function), out=torch.empty(SHAPE))


def test_jax_arrays() -> None:
    pytest.importorskip("jax")
    framework = installed()["jax"]
    arrays = arrays_of(framework, "add_rms_norm")
    for name in ("out", "residual_out"):
        for buffer in (empty(framework), empty(FRAMEWORKS["numpy"])):
            with pytest.raises(OptionError, match="JAX's arrays never change"):
                normkit.add_rms_norm(*arrays, **{name: buffer})
            with pytest.raises(OptionError, match="JAX's arrays never change"):
                normkit.explain("add_rms_norm", *arrays, **{name: buffer})
