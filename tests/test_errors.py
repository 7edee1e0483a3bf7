# SPDX-License-Identifier: Apache-2.0
"""Bad input raises the error of its kind, which says what was given and what would work, before anything is written."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normkit import DeviceError, DtypeError, NormkitError, OptionError, ShapeError

from .cases import NumpyArray
from .frameworks import Framework, installed

FRAMEWORKS = installed()
FUNCTIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
IN_PLACE = ("add_rms_norm_", "add_layer_norm_")
NAMES = ("x", "residual", "weight", "bias")
NORMAL = np.random.default_rng(7).standard_normal


def arrays_of_a_call() -> dict[str, NumpyArray | None]:
    """Arrays that go well together."""
    shapes = {"x": (3, 8), "residual": (3, 8), "weight": (8,), "bias": (8,)}
    return {name: np.asarray(NORMAL(shape), np.float32) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Bad:
    """What is wrong with a call, the error it must raise, and what its message must contain."""

    error: type[NormkitError]
    says: tuple[str, ...]
    arrays: dict[str, NumpyArray | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def concerns(self, function: str) -> bool:
        adds, in_place = function.startswith("add_"), function.endswith("_")
        if self.arrays.keys() == {"residual"} and not adds:
            return False
        return not (in_place and "out_dtype" in self.options)


def _shape(name: str, shape: tuple[int, ...], **others: NumpyArray | None) -> Bad:
    expected = "(3, 8)" if name == "residual" else "(8,)"
    return Bad(ShapeError, (name, expected, str(shape)), others | {name: NORMAL(shape).astype(np.float32)})


def _option(error: type[NormkitError], name: str, value: Any, *says: str) -> Bad:
    return Bad(error, (name, *says), options={name: value})


FLOATS = ("float32", "bfloat16", "float16", "float64")
SHAPES = {
    "x without dimensions": Bad(
        ShapeError, ("x", "()", "dimension"), {"x": np.ones((), np.float32), "residual": np.ones((), np.float32)}
    ),
    "hidden size 0": Bad(
        ShapeError, ("x", "(3, 0)", "at least 1"), {"x": np.ones((3, 0), np.float32), "residual": np.ones((3, 0), np.float32)}
    ),
    "weight longer": _shape("weight", (9,)),
    "weight shorter": _shape("weight", (7,)),
    "weight of one": _shape("weight", (1,)),
    "weight of two dimensions": _shape("weight", (1, 8)),
    "weight of x's shape": _shape("weight", (3, 8)),
    "weight without dimensions": _shape("weight", ()),
    "bias longer": _shape("bias", (9,)),
    "bias of two dimensions": _shape("bias", (1, 8)),
    "residual of another last dimension": _shape("residual", (3, 9)),
    "residual of other rows": _shape("residual", (4, 8)),
    "residual that would broadcast": _shape("residual", (1, 8)),
    "residual of fewer dimensions": _shape("residual", (8,)),
    "residual of as many elements": _shape("residual", (8, 3)),
    "residual to which x would broadcast": _shape("residual", (2, 3, 8)),
}
OPTIONS = {
    **{f"eps {value!r}": _option(OptionError, "eps", value, repr(value)) for value in (-1.0, -1e-30)},
    **{
        f"{name} {value!r}": _option(OptionError, name, value, repr(value), "finite number")
        for name in ("eps", "weight_offset")
        for value in (float("nan"), float("inf"), "1e-6", None, 1j, [1e-6])
    },
    "rounding misspelt": _option(OptionError, "rounding", "stord", "'stord'", "'sum', 'stored', 'hf'"),
    "rounding of another type": _option(OptionError, "rounding", 2, "2", "'sum', 'stored', 'hf'"),
    "implementation misspelt": _option(OptionError, "implementation", "referense", "'referense'", "did you mean 'reference'?"),
    "implementation of another type": _option(OptionError, "implementation", 3, "3", "'reference'"),
    **{
        f"out_dtype {value!r}": _option(DtypeError, "out_dtype", value, *FLOATS)
        for value in ("int32", "float8_e4m3fn", "complex64", "flaot32", 3, ["float32"])
    },
    "weight_offset without weight": Bad(
        OptionError, ("weight_offset=1.0", "none was given"), {"weight": None}, {"weight_offset": 1.0}
    ),
}
BAD = SHAPES | OPTIONS


def positional(function: str, arrays: dict[str, Any]) -> list[Any]:
    """The arrays that a function takes, in order."""
    return [arrays[name] for name in NAMES if name != "residual" or function.startswith("add_")]


def _called(framework: Framework, how: str) -> Callable[..., Any]:
    """The ways in which a call is seen: at once, with a gradient (through torch's operators), traced, only explained."""

    def call(function: str, *arrays: Any, **options: Any) -> Any:
        if how == "explain":
            return framework.front_end.explain(function, *arrays, **options)
        if how == "gradient":
            arrays = tuple(array.requires_grad_() if array is not None else None for array in arrays)
        if how == "jit":
            import jax

            return jax.jit(lambda *given: getattr(framework.front_end, function)(*given, **options))(*arrays)
        return getattr(framework.front_end, function)(*arrays, **options)

    return call


def _ways() -> list[Any]:
    more = {"numpy": (), "torch": ("gradient",), "jax": ("jit",)}
    return [
        pytest.param(framework, how, id=f"{framework.name}-{how}")
        for framework in FRAMEWORKS.values()
        for how in ("call", "explain", *more[framework.name])
    ]


EACH_WAY = pytest.mark.parametrize(("framework", "how"), _ways())


def refused(framework: Framework, how: str, function: str, arrays: dict[str, Any], bad: Bad) -> None:
    """Assert that a call raises the right error and leaves its arrays alone."""
    before = {name: framework.numpy(array) for name, array in arrays.items()}
    before = {name: None if array is None else array.copy() for name, array in before.items()}
    with pytest.raises(bad.error) as caught:
        _called(framework, how)(function, *positional(function, arrays), **bad.options)
    assert isinstance(caught.value, NormkitError) and isinstance(caught.value, (ValueError, TypeError))
    for part in bad.says:
        assert part in str(caught.value)
    for name, array in arrays.items():
        np.testing.assert_array_equal(framework.numpy(array), before[name])


@EACH_WAY
@pytest.mark.parametrize("name", BAD)
def test_bad_call(framework: Framework, how: str, name: str, selected: list[str]) -> None:
    bad = BAD[name]
    if how == "explain" and "implementation" in bad.options:
        return  # it judges every implementation, whichever is asked for
    in_place = IN_PLACE if framework.name == "torch" and how != "gradient" else ()
    for function in (*FUNCTIONS, *in_place):
        if bad.concerns(function):
            arrays = {name: framework.array(array) for name, array in (arrays_of_a_call() | bad.arrays).items()}
            refused(framework, how, function, arrays, bad)
    assert not selected, "nothing may be chosen, let alone run, for a call that is wrong"


@EACH_WAY
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("operand", NAMES)
def test_dtype_that_is_not_supported(framework: Framework, how: str, operand: str, dtype: str) -> None:
    if how == "gradient" and dtype in ("int32", "uint8", "bool", "float8_e4m3fn"):
        how = "call"  # torch itself gives these no gradient
    arrays = {name: framework.array(array) for name, array in arrays_of_a_call().items()}
    if framework.name == "torch":
        import torch

        arrays[operand] = arrays[operand].to(getattr(torch, dtype))
    else:
        numpy_dtype = np.dtype(ml_dtypes.float8_e4m3fn) if dtype.startswith("float8") else np.dtype(dtype)
        arrays[operand] = framework.array(np.ones_like(arrays_of_a_call()[operand], dtype=numpy_dtype))
    for function in FUNCTIONS:
        if operand != "residual" or function.startswith("add_"):
            with pytest.raises(DtypeError, match=rf"^{operand} .*float32, bfloat16, float16, float64.*got {dtype}(\n|$)"):
                _called(framework, how)(function, *positional(function, arrays))


@EACH_WAY
@pytest.mark.parametrize("function", ["rms_norm", "layer_norm"])
def test_residual_dtype_where_no_residual_is_returned(framework: Framework, how: str, function: str) -> None:
    arrays = {name: framework.array(array) for name, array in arrays_of_a_call().items()}
    bad = Bad(OptionError, ("residual_dtype='float32'", "add_"), options={"residual_dtype": "float32"})
    refused(framework, how, function, arrays, bad)


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["int32", "float8_e5m2"])
def test_residual_dtype_that_is_not_supported(framework: Framework, dtype: str) -> None:
    arrays = {name: framework.array(array) for name, array in arrays_of_a_call().items()}
    bad = Bad(DtypeError, ("residual_dtype", dtype, *FLOATS), options={"residual_dtype": dtype})
    refused(framework, "call", "add_rms_norm", arrays, bad)


def _strangers(framework: Framework) -> dict[str, Any]:
    """Things that are not arrays of the framework, by what they are called in an error."""
    things: dict[str, Any] = {"list": [1.0] * 8, "float": 1.0, "str": "weight"}
    if framework.name == "torch":
        things["ndarray"] = np.ones(8, np.float32)
    for other in {"torch", "jax"} & FRAMEWORKS.keys() - {framework.name}:
        foreign = FRAMEWORKS[other].array(np.ones(8, np.float32))
        things[type(foreign).__qualname__] = foreign
    return things


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("operand", NAMES)
def test_what_is_not_an_array_of_the_framework(framework: Framework, operand: str) -> None:
    for kind, thing in _strangers(framework).items():
        if framework.name == "numpy" and operand == "x" and kind in ("Tensor", "ArrayImpl"):
            continue  # then the call is that framework's
        arrays = {name: framework.array(array) for name, array in arrays_of_a_call().items()} | {operand: thing}
        for how in ("call", "explain"):
            with pytest.raises(DtypeError, match=f"(?s){re.escape(operand)}.*{re.escape(kind)}"):
                _called(framework, how)("add_rms_norm", *positional("add_rms_norm", arrays))


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_x_must_be_there(framework: Framework) -> None:
    with pytest.raises(DtypeError, match=r"x.*NoneType"):
        framework.front_end.add_rms_norm(None, None)


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_a_numpy_scalar_is_a_number_with_and_without_a_gradient(framework: Framework) -> None:
    x, weight = (framework.array(arrays_of_a_call()[name]) for name in ("x", "weight"))
    assert weight is not None
    expected = framework.numpy(framework.front_end.rms_norm(x, weight, eps=float(np.float32(1e-3))))
    leaves = [weight, weight.clone().requires_grad_()] if framework.name == "torch" else [weight]
    for leaf in leaves:
        for eps in (np.float32(1e-3), np.float64(np.float32(1e-3))):
            y = framework.numpy(framework.front_end.rms_norm(x, leaf, eps=eps))
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_explain_of_a_function_that_is_not_there(framework: Framework) -> None:
    for name in ("rmsnorm", "add_rms", "explain", "compute", None, ["rms_norm"]):
        with pytest.raises(OptionError, match=r"is not one of 'rms_norm', 'layer_norm', 'add_rms_norm', 'add_layer_norm'"):
            framework.front_end.explain(name, framework.array(np.ones((2, 4), np.float32)))


@pytest.mark.parametrize("function", ["call", "explain"])
def test_tensors_on_different_devices(function: str) -> None:
    torch = pytest.importorskip("torch")
    framework = FRAMEWORKS["torch"]
    for operand in NAMES[1:]:
        arrays = {name: torch.ones(3, 8) if name in NAMES[:2] else torch.ones(8) for name in NAMES}
        arrays[operand] = arrays[operand].to("meta")
        with pytest.raises(DeviceError, match=f"^{operand} is on meta and x on cpu"):
            _called(framework, function)("add_rms_norm", *positional("add_rms_norm", arrays))
    with pytest.raises(DeviceError, match=r"^residual is on cpu and x on meta"):
        _called(framework, function)("add_rms_norm", torch.ones(3, 8, device="meta"), torch.ones(3, 8))


def test_a_sparse_tensor() -> None:
    torch = pytest.importorskip("torch")
    dense = torch.ones(3, 8)
    for arrays in ((dense.to_sparse(), dense), (dense, dense.to_sparse())):
        with pytest.raises(NormkitError, match="sparse"):
            FRAMEWORKS["torch"].front_end.add_rms_norm(*arrays)


ON_TWO_DEVICES = """
import jax, numpy as np, normkit_jax
from normkit import DeviceError
first, second = jax.devices()
x, weight = np.ones((3, 8), np.float32), np.ones(8, np.float32)
for call in (normkit_jax.add_rms_norm, lambda *arrays: normkit_jax.explain("add_rms_norm", *arrays)):
    try:
        call(jax.device_put(x, first), jax.device_put(x, second), weight)
    except DeviceError as error:
        assert "residual is on" in str(error) and "jax.device_put" in str(error), error
    else:
        raise SystemExit("two devices were accepted")
y, residual_out = normkit_jax.add_rms_norm(jax.device_put(x, second), jax.numpy.asarray(x), weight)
assert y.devices() == residual_out.devices() == {second}, "an uncommitted array goes where the committed ones are"
"""


def test_jax_arrays_on_different_devices() -> None:
    pytest.importorskip("jax")
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", ON_TWO_DEVICES], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
