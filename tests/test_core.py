# SPDX-License-Identifier: Apache-2.0
"""The core alone: the choice, the description of a call, and which front end computes what."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import normkit
from normkit import DtypeError, OptionError, ShapeError, UnsupportedError, arrays, reference, registry
from normkit.call import FUNCTIONS, Call, bind
from normkit.interface import Forward, Gradients, Rejected, Wanted
from normkit.registry import Implementation, Verdict
from normkit.spec import NormSpec, Operand, Problem, describe

from .frameworks import installed

FRAMEWORKS = installed()
ROOT = Path(__file__).parent.parent
X = Operand((4, 6, 64), "bfloat16")
PROBLEM = describe(NormSpec("rms"), X)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> tuple[Implementation, ...]:
    """Four implementations: one that refuses, one by name only elsewhere, one without an in-place form, one that has all."""
    modules: dict[str, Any] = {name: ModuleType(f"normkit_test_{name}") for name in ("refusing", "named", "plain", "whole")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.supports = (lambda problem: Rejected("it is Tuesday")) if name == "refusing" else reference.supports
        if name in ("refusing", "whole"):
            module.forward_ = reference.forward_
    automatic = {"named": (), "plain": ("cpu", "cuda")}
    return tuple(Implementation(name, module.__name__, automatic.get(name)) for name, module in modules.items())


def test_explain_judges_all_in_order(table: tuple[Implementation, ...]) -> None:
    verdicts = registry.explain(PROBLEM, table)
    assert verdicts == [
        Verdict("refusing", False, "it is Tuesday"),
        Verdict("named", False, "on cpu only by name: it is not the best choice there"),
        Verdict("plain", True, "computes this on cpu"),
        Verdict("whole", True, "computes this on cpu"),
    ]
    assert registry.select(PROBLEM, table).name == "plain"


def test_the_automatic_choice_depends_on_the_platform(table: tuple[Implementation, ...]) -> None:
    chosen = {
        platform: registry.select(describe(NormSpec("rms"), X, platform=platform), table).name for platform in ("cuda", "tpu")
    }
    assert chosen == {"cuda": "plain", "tpu": "whole"}


def test_in_place_needs_a_form_for_it(table: tuple[Implementation, ...]) -> None:
    problem = describe(NormSpec("rms"), X, X, in_place=True)
    reasons = {verdict.name: verdict.reason for verdict in registry.explain(problem, table)}
    assert reasons["named"] == reasons["plain"] == "it cannot compute in place"
    assert registry.select(problem, table).name == "whole"
    with pytest.raises(UnsupportedError, match=r"'plain' cannot compute this: it cannot compute in place.* would take whole"):
        registry.select(problem, table, "plain")


def test_by_name_nothing_falls_back(table: tuple[Implementation, ...]) -> None:
    assert registry.select(PROBLEM, table, "named").name == "named"
    with pytest.raises(UnsupportedError, match=r"'refusing' cannot compute this: it is Tuesday; .*None would take plain"):
        registry.select(PROBLEM, table, "refusing")
    with pytest.raises(UnsupportedError, match=r"'refusing' cannot compute this: it is Tuesday; .*none either"):
        registry.select(PROBLEM, table[:2], "refusing")
    with pytest.raises(UnsupportedError, match=r"no implementation .*refusing: it is Tuesday; named: on cpu only by name"):
        registry.select(PROBLEM, table[:2])


@pytest.mark.parametrize(("asked", "says"), [("wole", "did you mean 'whole'"), ("zzz", "'plain', 'whole'$"), ("", "'whole'$")])
def test_unknown_names(table: tuple[Implementation, ...], asked: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        registry.select(PROBLEM, table, asked)


def test_an_implementation_is_imported_when_first_considered() -> None:
    missing = Implementation("missing", "normkit_no_such_module")
    (reference_entry,) = registry.explain(PROBLEM, [Implementation("reference", "normkit.reference")])
    assert reference_entry.accepted
    assert registry.select(PROBLEM, [Implementation("reference", "normkit.reference"), missing]).name == "reference"
    with pytest.raises(ModuleNotFoundError, match="normkit_no_such_module"):
        missing.load()


def test_spec() -> None:
    assert NormSpec("layer").subtract_mean and not NormSpec("rms").subtract_mean
    assert NormSpec("rms", eps=0.0).eps == 0 and NormSpec("rms", eps=1).eps == 1
    assert hash(NormSpec("rms")) == hash(NormSpec("rms")) and NormSpec("rms") != NormSpec("layer")
    with pytest.raises(FrozenInstanceError):
        NormSpec("rms").eps = 0.1  # type: ignore[misc]
    for wrong, says in (({"kind": "batch"}, "'batch'.*rms, layer"), ({"kind": "rms", "eps": -1.0}, "-1.0")):
        with pytest.raises(OptionError, match=says):
            NormSpec(**wrong)


def test_problem_properties() -> None:
    assert (PROBLEM.hidden_size, PROBLEM.rows, PROBLEM.dtypes, PROBLEM.compute_dtype) == (64, 24, ("bfloat16",), "float32")
    assert (PROBLEM.residual_out_dtype, PROBLEM.h_dtype, PROBLEM.out_dtype) == (None, "bfloat16", "bfloat16")
    wide = describe(NormSpec("rms"), X, X._replace(dtype="float32"), Operand((64,), "float16"), Operand((64,), "float64"))
    assert wide.dtypes == ("bfloat16", "float32", "float16", "float64") and wide.compute_dtype == "float64"
    assert (wide.residual_out_dtype, wide.h_dtype, wide.out_dtype) == ("float32", "float32", "bfloat16")
    assert describe(NormSpec("rms"), Operand((64,), "float32")).rows == 1
    assert describe(NormSpec("rms"), Operand((3, 0, 64), "float32")).rows == 0
    started = describe(NormSpec("rms"), X, residual_dtype="float32", out_dtype="float16")
    assert (started.residual_out_dtype, started.h_dtype, started.out_dtype) == ("float32", "float32", "float16")
    assert describe(NormSpec("rms"), X, residual_dtype="bfloat16").residual_out_dtype is None, "x itself serves"
    assert describe(NormSpec("rms"), X, X, residual_dtype="bfloat16").residual_out_dtype == "bfloat16"
    assert isinstance(hash(wide), int)


def test_describe_refuses_what_does_not_belong_together() -> None:
    residual = X._replace(dtype="float32")
    with pytest.raises(OptionError, match="add_rms_norm_ needs a residual"):
        describe(NormSpec("rms"), X, in_place=True)
    for changed in ({"residual_dtype": "bfloat16"}, {"out_dtype": "float32"}):
        with pytest.raises(OptionError, match="in place"):
            describe(NormSpec("rms"), X, residual, in_place=True, **changed)  # type: ignore[arg-type]
    assert describe(NormSpec("rms"), X, residual, in_place=True).in_place
    with pytest.raises(OptionError, match="weight_offset"):
        describe(NormSpec("rms", weight_offset=1.0), X)
    with pytest.raises(DtypeError, match="weight must be one of"):
        describe(NormSpec("rms"), X, weight=Operand((64,), "int8"))
    with pytest.raises(ShapeError, match="weight"):
        describe(NormSpec("rms"), X, weight=Operand((6, 64), "float32"))


def test_wanted_and_gradients_share_one_dh_where_the_dtypes_agree() -> None:
    same = describe(NormSpec("rms"), X, X, Operand((64,), "float32"))
    other = describe(NormSpec("rms"), X, X._replace(dtype="float32"))
    assert Wanted.by(same) == (True, False, True, False)
    assert Wanted.by(other) == (True, True, False, False)
    assert Wanted.by(same, x=False) == (True, False, True, False)
    assert Wanted.by(other, x=False, weight=False) == (False, True, False, False)
    assert Wanted.by(PROBLEM, x=False) == (False, False, False, False)
    found = Gradients("dx", "dresidual", "dweight", None)
    assert found.by_operand(same) == ("dx", "dx", "dweight", None)
    assert found.by_operand(other) == ("dx", "dresidual", "dweight", None)


def test_call() -> None:
    x, weight = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    call = bind(vars(normkit), "add_rms_norm", x, None, weight, eps=0.5)
    assert call.parts() == ("add_rms_norm", (x, None, weight, None, None, None), (0.5, 0.0, None, None, None, None))
    assert Call.of(*call.parts()).parts() == call.parts()
    assert (call.kind, call.returns_residual, list(call.arrays)) == ("rms", True, ["x", "weight"])
    assert bind(vars(normkit), "layer_norm", x).eps == 1e-5 and bind(vars(normkit), "rms_norm", x).eps == 1e-6
    assert call.result(Forward("y", None, None, None)) == ("y", x)
    assert replace(call, function="layer_norm").result(Forward("y", "h", None, None)) == "y"
    with pytest.raises(OptionError, match="'add_rms_norm_' is not one of"):
        bind(vars(normkit), "add_rms_norm_", x)
    assert [name for name in FUNCTIONS if not name.endswith("_")] == [name for name in FUNCTIONS if hasattr(normkit, name)]


def test_arrays_of_every_framework() -> None:
    for name, framework in FRAMEWORKS.items():
        array = framework.array(np.array([[0.1, 1e-9, 65519.0, 65520.0]], np.float32))
        assert arrays.framework_of(array) == name
        assert arrays.dtype_name(array.dtype) == "float32"
        assert arrays.cast(array, "float32") is array
        for dtype in ("bfloat16", "float16", "float32"):
            with np.errstate(over="ignore"):  # float16 has no 65520
                cast, rounded = arrays.cast(array, dtype), arrays.rounded(array, dtype)
                expected = np.asarray(framework.numpy(array)).astype(arrays.numpy_dtype(dtype)).astype(np.float32)
            assert (arrays.dtype_name(cast.dtype), arrays.dtype_name(rounded.dtype)) == (dtype, "float32")
            np.testing.assert_array_equal(framework.numpy(rounded), expected)
            np.testing.assert_array_equal(framework.numpy(arrays.cast(cast, "float32")), expected)
    assert arrays.framework_of([1.0]) is None and arrays.framework_of(1.0) is None and arrays.framework_of(None) is None


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if name != "numpy"])
def test_a_call_goes_to_the_front_end_of_its_arrays(name: str) -> None:
    framework = FRAMEWORKS[name]
    x, residual, weight = (framework.array(np.full(shape, 2.0, np.float32)) for shape in ((3, 4), (3, 4), (4,)))
    for function in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
        operands = (x, residual, weight) if function.startswith("add_") else (x, weight)
        found, expected = (getattr(module, function)(*operands, eps=0.5) for module in (normkit, framework.front_end))
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for one, other in pairs:
            assert type(one) is type(other) is type(x)
            np.testing.assert_array_equal(framework.numpy(one), framework.numpy(other))
        assert normkit.explain(function, *operands) == framework.front_end.explain(function, *operands)


class Speaks:
    """An array of a library that normkit does not know."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_what_speaks_dlpack_is_computed_by_numpy() -> None:
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((3, 4), (4,)))
    y, residual_out = normkit.add_rms_norm(Speaks(x), x, Speaks(weight))
    expected = normkit.add_rms_norm(x, x, weight)
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(residual_out, expected[1])
    assert normkit.explain("rms_norm", Speaks(x))[-1].accepted
    array = Speaks(x)
    assert np.shares_memory(normkit.add_rms_norm(array, None)[1], x), "without a residual, x itself is the residual"

    class Elsewhere(Speaks):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("it is on a device of its own")

    with pytest.raises(DtypeError, match=r"weight speaks DLPack.*device of its own"):
        normkit.rms_norm(x, Elsewhere(weight))


WITHOUT_FRAMEWORKS = """
import importlib.abc, sys, warnings
warnings.simplefilter("error")
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "jax", "jaxlib", "triton", "safetensors"}:
            raise ModuleNotFoundError(f"{name} is not there", name=name)
sys.meta_path.insert(0, Blocked())
import numpy as np, normkit
for dtype in ("float32", "float16", "float64"):
    x, weight = np.array([[1.0, 7.0], [np.inf, 1.0]], dtype), np.ones(2, dtype)
    for function in (normkit.rms_norm, normkit.layer_norm):
        assert function(x, weight, weight, eps=0.0).dtype == dtype
    for function in (normkit.add_rms_norm, normkit.add_layer_norm):
        y, residual_out = function(x, x, weight)
        assert (residual_out == 2 * x).all() and y.dtype == dtype
assert normkit.explain("rms_norm", x)[-1].name == "reference"
try:
    import normkit_torch
except normkit.MissingPackageError as error:
    assert "pip install torch" in str(error)
"""


def test_numpy_needs_no_framework() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FRAMEWORKS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_problem_is_plain_data() -> None:
    values = [getattr(PROBLEM, field.name) for field in fields(PROBLEM)]
    assert all(isinstance(value, (NormSpec, tuple, str, bool, type(None))) for value in values)
    assert eval(repr(PROBLEM), {"Problem": Problem, "NormSpec": NormSpec}) == PROBLEM
