# SPDX-License-Identifier: Apache-2.0
"""A call like one before is launched at once, with the same bits; one that is not is treated as if there had been none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, cast

import numpy as np
import pytest

from normkit import OptionError, registry

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor

import normkit_torch
from normkit_torch import cpu, prepared

from . import stand_in, test_errors, test_errors_in_place, test_errors_out, test_out

FRAMEWORK = test_errors.FRAMEWORKS["torch"]
FUNCTIONS = (*test_errors.FUNCTIONS, *test_errors.IN_PLACE)
EACH = pytest.mark.parametrize("function", FUNCTIONS)
ADD = pytest.mark.parametrize("function", test_errors.FUNCTIONS[2:])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

if not {v.name: v for v in normkit_torch.explain("rms_norm", torch.ones(2, 8))}["cpu"].accepted or torch.cuda.is_available():
    pytest.skip("the cpu implementation does not run here", allow_module_level=True)


@pytest.fixture(autouse=True, params=["compiled", "in Python"])
def _nothing_prepared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.forget()
    if request.param == "in Python":
        monkeypatch.setattr(cpu, "prepare", stand_in.prepare)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementations chosen, while calls are prepared; the fixture `selected` switches that off."""
    names: list[str] = []
    original = registry.select

    def select(*arguments: Any, **options: Any) -> Any:
        entry = original(*arguments, **options)
        names.append(entry.name)
        return entry

    monkeypatch.setattr(registry, "select", select)
    return names


def rows(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls_of(function: str, dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)) -> Iterator[tuple[bool, Callable[[], Any]]]:
    """Every set of tensors that a function takes: whether x is copied into residual_out, and the call.

    It makes its tensors anew and returns all that it may have changed.
    """
    x, stream, affine = dtypes
    adds, in_place = function.startswith("add_"), function.endswith("_")
    both, no = (False, True), (False,)
    options = product(no if in_place else both, *(both if adds and not in_place else no for _ in range(2)), both, both)
    for has_out, has_residual_out, alone, has_weight, has_bias in options:

        def call(*given: bool) -> tuple[Tensor, ...]:
            has_out, has_residual_out, alone, has_weight, has_bias = given
            residual = None if alone else rows(5, 24, dtype=stream, seed=1)
            arrays = [rows(5, 24, dtype=x), *([residual] if adds else [])]
            arrays += [rows(24, dtype=affine, seed=2) if has_weight else None, rows(24, dtype=x) if has_bias else None]
            buffers = {"out": rows(5, 24, dtype=x, seed=3)} if has_out else {}
            if has_residual_out:
                buffers["residual_out"] = rows(5, 24, dtype=x if alone else stream, seed=4)
            results = test_out.tuple_of(getattr(normkit_torch, function)(*arrays, **buffers))
            for one, other in zip(buffers.values(), results if has_out else results[1:], strict=False):
                assert one is other
            return (*results, *(tensor for tensor in (*arrays, *buffers.values()) if tensor is not None))

        yield has_residual_out and alone, lambda given=(has_out, has_residual_out, alone, has_weight, has_bias): call(*given)  # type: ignore[misc]


def assert_alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        np.testing.assert_array_equal(test_out.bits(FRAMEWORK, one), test_out.bits(FRAMEWORK, other))


@EACH
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, F16), (F32, F16, BF16), (F16, F16, F32)])
def test_the_second_call_chooses_nothing_and_gives_the_same_bits(
    function: str, dtypes: tuple[torch.dtype, ...], chosen: list[str]
) -> None:
    for copies_x, call in calls_of(function, dtypes):
        prepared.forget()
        chosen.clear()
        first, has_chosen = call(), list(chosen)
        assert has_chosen == ["cpu"] and bool(prepared._calls) != copies_x
        for _ in range(2):
            assert_alike(call(), first)
        assert copies_x or chosen == has_chosen


@pytest.mark.parametrize("options", [{"residual_dtype": F32}, {"out_dtype": F16}, {"rounding": "hf"}, {"weight_offset": 1.0}])
@ADD
def test_options_are_part_of_the_call(function: str, options: dict[str, Any], chosen: list[str]) -> None:
    tensors = [rows(5, 24, dtype=BF16, seed=seed) for seed in (0, 1)] + [rows(24, dtype=BF16)]
    call = getattr(normkit_torch, function)
    plain, first = call(*tensors), call(*tensors, **options)
    assert_alike(call(*tensors, **options), first)
    assert_alike(call(*tensors), plain)
    assert len(chosen) == 2
    assert any(one.dtype != other.dtype or not torch.equal(one, other) for one, other in zip(first, plain, strict=True))


@pytest.mark.parametrize("function", test_errors.FUNCTIONS)
def test_gradients_are_those_of_the_first_call(function: str, chosen: list[str]) -> None:
    adds = function.startswith("add_")

    def call() -> tuple[Tensor, ...]:
        leaves = [rows(5, 24, seed=seed).requires_grad_() for seed in range(1 + adds)] + [rows(24).requires_grad_()]
        results = test_out.tuple_of(getattr(normkit_torch, function)(*leaves))
        grads = torch.autograd.grad(results, leaves, [rows(5, 24, seed=7) for _ in results])
        return *(result.detach() for result in results), *grads

    first = call()
    assert chosen == ["cpu", "cpu"]
    assert_alike(call(), first)
    assert chosen == ["cpu", "cpu"], "neither pass is chosen again"


def _prepare(function: str, *shapes: tuple[int, int], **options: Any) -> None:
    """Prepare calls of a function with every set of tensors."""
    for shape in shapes:
        for has_weight, has_bias, has_out, has_residual_out in product((False, True), repeat=4):
            tensors: list[Any] = [rows(*shape), rows(*shape)][: 1 + function.startswith("add_")]
            tensors += [rows(shape[-1]) if given else None for given in (has_weight, has_bias)]
            buffers = {"out": rows(*shape)} if has_out else {}
            if has_residual_out and function.startswith("add_"):
                buffers["residual_out"] = rows(*shape)
            if "weight_offset" not in options or has_weight:
                getattr(normkit_torch, function)(*tensors, **({} if function.endswith("_") else buffers), **options)
    assert prepared._calls


@EACH
@pytest.mark.parametrize("name", test_errors.BAD)
def test_a_bad_call_is_refused_after_good_ones(function: str, name: str) -> None:
    bad = test_errors.BAD[name]
    if bad.concerns(function):
        _prepare(function, (3, 8))
        arrays = {name: FRAMEWORK.array(array) for name, array in (test_errors.arrays_of_a_call() | bad.arrays).items()}
        test_errors.refused(FRAMEWORK, "call", function, arrays, bad)


@EACH
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("operand", test_errors.NAMES)
@pytest.mark.parametrize("stranger", ["float64", "int32", "meta", "list", "ndarray", "nested", "sparse", "mkldnn"])
def test_another_kind_of_operand_after_good_calls(function: str, operand: str, stranger: str) -> None:
    _prepare(function, (3, 8))
    make: dict[str, Callable[[Tensor], Any]] = {
        "list": lambda tensor: tensor.tolist(),
        "ndarray": Tensor.numpy,
        "nested": lambda tensor: cast(Any, torch.nested).nested_tensor([tensor]),
        "sparse": lambda tensor: tensor.to_sparse(),
        "mkldnn": lambda tensor: cast(Any, tensor).to_mkldnn(),
    }

    def call() -> Any:
        tensors: dict[str, Any] = {"x": rows(3, 8), "residual": rows(3, 8, seed=1), "weight": rows(8), "bias": rows(8)}
        tensor = tensors[operand]
        tensors[operand] = make[stranger](tensor) if stranger in make else tensor.to(stranger)
        return getattr(normkit_torch, function)(*test_errors.positional(function, tensors))

    found = outcome(call)
    prepared.forget()
    assert found == outcome(call)


def outcome(call: Callable[[], Any]) -> Any:
    """What comes of a call, to be compared: its results' bits, or its error."""
    try:
        results = test_out.tuple_of(call())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is to be the same
        return type(error), str(error)
    return [(result.dtype, result.stride(), test_out.bits(FRAMEWORK, result).tobytes()) for result in results]


IN_PLACE_ERRORS = [
    *((test_errors_in_place.test_a_gradient, operand) for operand in range(4)),
    (test_errors_in_place.test_no_residual,),
    (test_errors_in_place.test_expanded_memory,),
    (test_errors_in_place.test_rows_that_overlap_each_other,),
    (test_errors_in_place.test_x_and_residual_in_one_memory,),
    *((test_errors_in_place.test_x_and_residual_that_overlap_in_part, shift) for shift in (1, 3, 8, 31)),
    *((test_errors_in_place.test_weight_or_bias_in_the_memory_of_x_or_residual, operand) for operand in (2, 3)),
    (test_errors_in_place.test_neighbours_in_one_buffer_do_not_share_memory,),
]


@pytest.mark.parametrize("function", test_errors.IN_PLACE)
@pytest.mark.parametrize(("error", "arguments"), [(error, arguments) for error, *arguments in IN_PLACE_ERRORS])
def test_what_is_refused_in_place_after_good_calls(function: str, error: Any, arguments: list[int]) -> None:
    _prepare(function, (3, 8), (4, 8))
    error(getattr(normkit_torch, function), *arguments)


@ADD
@pytest.mark.parametrize("name", test_errors_out.BAD)
def test_what_cannot_be_written_to_after_good_calls(function: str, name: str) -> None:
    arrays, bad = test_out.arrays_of(FRAMEWORK, function), test_errors_out.BAD[name]
    for names in (("out",), ("residual_out",), ("out", "residual_out")):
        getattr(normkit_torch, function)(*arrays, **{name: test_out.empty(FRAMEWORK) for name in names})
    assert len(prepared._calls) == 3
    test_errors_out.refused(FRAMEWORK, bad.error, bad.says, function, arrays, bad.make(FRAMEWORK, arrays))


@ADD
@pytest.mark.parametrize("operand", range(6))
def test_a_gradient_after_good_calls(function: str, operand: int) -> None:
    tensors = [*test_out.arrays_of(FRAMEWORK, function), test_out.empty(FRAMEWORK), test_out.empty(FRAMEWORK)]
    getattr(normkit_torch, function)(*tensors[:4], out=tensors[4], residual_out=tensors[5])
    test_errors_out.test_a_gradient(function, operand)


PAIRS = [(one, other) for one in (4, 5) for other in range(6) if other != one]


@ADD
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_memory_that_was_apart_with_fewer_rows(function: str, one: int, other: int) -> None:
    """The addresses are the same each time, and what lies at them is longer."""
    memory = [torch.zeros(1000) for _ in range(6)]
    memory[other] = memory[one][32:]

    def call(count: int) -> Any:
        shapes = [(count, 8)] * 2 + [(8,)] * 2 + [(count, 8)] * 2
        tensors = [flat[: int(np.prod(shape))].view(shape) for flat, shape in zip(memory, shapes, strict=True)]
        return getattr(normkit_torch, function)(*tensors[:4], out=tensors[4], residual_out=tensors[5])

    for _ in range(2):
        for tensor in memory:
            tensor.copy_(rows(len(tensor)))
        assert outcome(lambda: call(4))[0] != OptionError
        before = [tensor.clone() for tensor in memory]
        with pytest.raises(OptionError, match="share memory"):
            call(5)
        assert all(map(torch.equal, memory, before))


@pytest.mark.parametrize("times", range(1, 4))
def test_versions_are_counted_once_a_call(times: int) -> None:
    x, residual, weight, out, residual_out = rows(3, 8), rows(3, 8), rows(8), rows(3, 8), rows(3, 8)
    for _ in range(times):
        normkit_torch.add_rms_norm(x, residual, weight, out=out, residual_out=residual_out)
    assert [tensor._version for tensor in (x, residual, weight, out, residual_out)] == [0, 0, 0, times, times]
    for _ in range(times):
        normkit_torch.add_rms_norm_(x, residual, weight)
        normkit_torch.rms_norm(residual, weight, out=out)
    assert [tensor._version for tensor in (x, residual, weight, out)] == [times, times, 0, 2 * times]
    leaf = torch.ones(8, requires_grad=True)
    products = [(leaf * written).sum() for written in (x, residual, out)]
    normkit_torch.add_rms_norm_(x, residual, weight)
    normkit_torch.rms_norm(residual, weight, out=out)
    for one in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            one.backward()
