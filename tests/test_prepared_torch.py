# SPDX-License-Identifier: Apache-2.0
"""What torch treats in another way is so after calls were prepared too; threads, limits, and the private parts relied on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from .at_once import at_once
from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import normkit_torch
from normkit.cpu import library
from normkit.spec import Problem
from normkit_torch import add_rms_norm, add_rms_norm_, layer_norm, prepared, rms_norm

from .test_prepared import _nothing_prepared, rows

__all__ = ["_nothing_prepared"]  # the fixture

if not {v.name: v for v in normkit_torch.explain("rms_norm", torch.ones(2, 8))}["cpu"].accepted or torch.cuda.is_available():
    pytest.skip("the cpu implementation does not run here", allow_module_level=True)


class Logged(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*arguments, **(options or {}))


def within(mode: Callable[[], Any], call: Callable[[], Any]) -> Any:
    with mode():
        return call()


def _leaf(dtype: torch.dtype | None = None) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        weight = rows(8).requires_grad_()
        y = layer_norm(rows(3, 8), weight)
        (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
        return y.detach(), gradient
    finally:
        torch.set_default_dtype(before)


def _dual() -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(rms_norm(forward_ad.make_dual(rows(3, 8), rows(3, 8, seed=5)), rows(8))))


def _data() -> Any:
    weight = torch.nn.Parameter(rows(8), requires_grad=False)
    rms_norm(rows(3, 8), weight)
    weight.data = rows(8).half()
    half = rms_norm(rows(3, 8), weight)
    weight.data = rows(9)
    return half, rms_norm(rows(3, 9), weight), rms_norm(rows(3, 8), weight)


def _set() -> Any:
    x = rows(3, 8)
    rms_norm(x, rows(8))
    cast(Any, x).set_(rows(3, 8, seed=3))
    moved = rms_norm(x, rows(8)).clone()
    cast(Any, x).set_(rows(8, 3).t())
    return moved, rms_norm(x, rows(8))


def _toggled() -> Any:
    x = rows(3, 8)
    rms_norm(x, rows(8))
    y = rms_norm(x.requires_grad_(), rows(8))
    assert y.requires_grad and not rms_norm(x.detach(), rows(8)).requires_grad
    with torch.no_grad():
        assert not rms_norm(x, rows(8)).requires_grad
    assert rms_norm(x, rows(8)).requires_grad
    return y.detach(), *torch.autograd.grad(y, x, rows(3, 8))


def _inference() -> Any:
    with torch.inference_mode():
        x, residual, made = rows(3, 8) * 2, rows(3, 8) * 2, rms_norm(rows(3, 8), rows(8))
        add_rms_norm_(x, residual, rows(8))
        assert made.is_inference()
    return made, x, rms_norm(x, rows(8)), add_rms_norm_(x, residual, rows(8))


def _inference_below_a_mode() -> Any:
    with torch.inference_mode():
        x, residual = rows(3, 8) * 2, rows(3, 8) * 2
    with FlopCounterMode(display=False):
        return add_rms_norm_(x, residual, rows(8))


def _fake() -> Any:
    with FakeTensorMode() as mode:
        y = rms_norm(mode.from_tensor(rows(3, 8)), mode.from_tensor(rows(8)))
    return type(y) is not Tensor, y.shape, y.dtype


def _with_option(name: str, value: Any) -> Any:
    return rms_norm(rows(3, 8), rows(8), **{name: value})


CAPTURED = rows(3, 8, seed=9)
SITUATIONS: dict[str, Callable[[], Any]] = {
    "requires_grad after": _toggled,
    "inference mode": _inference,
    "tensors of inference mode below a mode": _inference_below_a_mode,
    "vmap": lambda: torch.func.vmap(lambda row: rms_norm(row, rows(8)) + rms_norm(CAPTURED, rows(8)))(rows(4, 8)),
    "vmap of x alike": lambda: torch.func.vmap(lambda x: rms_norm(x, rows(8)))(rows(2, 3, 8)),
    "grad": lambda: torch.func.grad(lambda x: (rms_norm(x, rows(8)) * rms_norm(CAPTURED, rows(8))).sum())(rows(3, 8)),
    "functionalize": lambda: torch.func.functionalize(lambda x: rms_norm(x, rows(8)) + rms_norm(CAPTURED, rows(8)))(rows(3, 8)),
    "in place under vmap": lambda: torch.func.vmap(lambda x: x + add_rms_norm_(rows(3, 8), rows(3, 8))[0])(rows(2, 3, 8)),
    "a dual level": _dual,
    "a dispatch mode": lambda: within(lambda: FlopCounterMode(display=False), lambda: rms_norm(rows(3, 8), rows(8))),
    "a function mode": lambda: within(Functions, lambda: rms_norm(rows(3, 8), rows(8))),
    "a default device": lambda: within(lambda: torch.device("meta"), lambda: rms_norm(CAPTURED, CAPTURED[0])),
    "a subclass": lambda: rms_norm(rows(3, 8).as_subclass(Logged), rows(8)).as_subclass(Tensor),
    "a weight of a subclass": lambda: rms_norm(rows(3, 8), rows(8).as_subclass(Logged)).as_subclass(Tensor),
    "a lazy sign": lambda: (rms_norm(torch._neg_view(rows(3, 8)), rows(8)), rms_norm(rows(3, 8), torch._neg_view(rows(8)))),
    "autocast": lambda: within(lambda: torch.autocast("cpu", torch.bfloat16), lambda: rms_norm(rows(3, 8), rows(8))),
    "gradients": _leaf,
    "gradients with float64 the default": lambda: _leaf(torch.float64),
    "gradients with bfloat16 the default": lambda: _leaf(torch.bfloat16),
    "another shape and dtype in a parameter": _data,
    "moved by set_": _set,
    "strided": lambda: rms_norm(rows(3, 16)[:, ::2], rows(8)),
    "transposed": lambda: rms_norm(rows(8, 3).t(), rows(8)),
    "expanded": lambda: rms_norm(rows(1, 8).expand(3, 8), rows(8)),
    "a strided weight": lambda: rms_norm(rows(3, 8), rows(16)[::2]),
    "one row with another stride": lambda: [rms_norm(rows(4, 8)[:1].as_strided((1, 8), (n, 1))) for n in (8, 20)][1],
    "no rows": lambda: rms_norm(rows(0, 8), rows(8)),
    "no dimensions": lambda: rms_norm(torch.tensor(1.0)),
    "x a parameter": lambda: rms_norm(torch.nn.Parameter(rows(3, 8), requires_grad=False), rows(8)),
    "fakes": _fake,
    "eps as a decimal": lambda: _with_option("eps", Decimal(1)),
    "eps as a complex number": lambda: _with_option("eps", 1 + 0j),
    "traced before dispatch": lambda: make_fx(lambda x: rms_norm(x, CAPTURED[0]), pre_dispatch=True)(rows(3, 8))(CAPTURED[:3]),
    "traced by fx": lambda: torch.fx.symbolic_trace(lambda x: rms_norm(x, CAPTURED[0]))(rows(3, 8)),
    "traced by make_fx": lambda: make_fx(lambda x: rms_norm(x, CAPTURED[0]))(rows(3, 8))(rows(3, 8, seed=1)),
    **{
        f"{name} {value!r}": partial(_with_option, name, value)
        for name in ("eps", "weight_offset")
        for value in (1, True, np.float32(1), np.ones(()), torch.ones(()), [1.0])
    },
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    call = SITUATIONS[name]

    def found() -> Any:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is to be the same
            return type(error), str(error)
        parts = result if isinstance(result, tuple) else (result,)
        return [(type(part), part.dtype, part.stride(), part.tolist()) if isinstance(part, Tensor) else part for part in parts]

    expected = found()
    for has_grad in (False, True):
        for x, weight in ((rows(3, 8), rows(8)), (rows(1, 8), None), (rows(3, 9), rows(9))):
            with torch.set_grad_enabled(has_grad):
                for options in ({}, {"eps": 1.0}, {"weight_offset": 1.0} if weight is not None else {}):
                    rms_norm(x, weight, **options)  # type: ignore[arg-type]
                    layer_norm(x, weight, **options)  # type: ignore[arg-type]
                add_rms_norm_(x.clone(), x.clone(), weight)
                with FlopCounterMode(display=False):
                    add_rms_norm_(x.clone(), x.clone(), weight)
    assert prepared._calls
    assert str(found()) == str(expected)
    assert str(found()) == str(expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_after_preparation(strict: bool) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = torch.nn.Buffer(CAPTURED)

        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x) + rms_norm(self.held)

    expected = Module()(rows(3, 8))
    Module()(rows(3, 8))
    program = torch.export.export(Module(), (rows(3, 8),), strict=strict)
    assert "normkit.norm" in str(program.graph)
    assert torch.equal(program.module()(rows(3, 8)), expected)


def test_compile_after_preparation() -> None:
    expected = [add_rms_norm(rows(3, 8), rows(3, 8), rows(8)) for _ in range(2)][1]
    torch.compiler.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = compiled(rows(3, 8), rows(3, 8), rows(8))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    weight = rows(8).requires_grad_()
    assert compiled(rows(3, 8), rows(3, 8), weight)[0].requires_grad


def test_the_number_of_threads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_for: list[int] = []
    packed = library.packed_without_pointers

    def noting(problem: Problem, threads: int, *rest: Any, **options: Any) -> bytes:
        prepared_for.append(threads)
        return packed(problem, threads, *rest, **options)

    monkeypatch.setattr(library, "packed_without_pointers", noting)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(rms_norm(rows(3, 8)), rms_norm(rows(3, 8)))
    finally:
        torch.set_num_threads(before)
    assert prepared_for == [1, 2]


def test_threads_at_once() -> None:
    shapes = [(rows_, hidden) for rows_ in (1, 3, 700) for hidden in (8, 64)]
    expected = {shape: rms_norm(rows(*shape), implementation="cpu") for shape in shapes}
    prepared.forget()
    wrong: list[tuple[int, int]] = []

    def work(_: int) -> None:
        for turn in range(200):
            shape = shapes[turn % len(shapes)]
            if not torch.equal(rms_norm(rows(*shape)), expected[shape]):
                wrong.append(shape)

    at_once(work)
    assert not wrong


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_MOST", 3)
    monkeypatch.setattr(prepared, "_MOST_ALIKE", 2)
    x = rows(3, 8)
    for hidden in range(1, 9):
        rms_norm(rows(3, hidden))
        assert 0 < len(prepared._calls) <= 3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for _ in range(2):
            rms_norm(x, rows(8).to(dtype))
    assert max(map(len, prepared._calls.values())) == 2


def test_no_tensor_is_kept_alive() -> None:
    tensors = [rows(3, 8), rows(3, 8), rows(8), rows(8), rows(3, 8), rows(3, 8)]
    for _ in range(2):
        add_rms_norm(*tensors[:4], out=tensors[4], residual_out=tensors[5])
        add_rms_norm_(*tensors[:4])
        results = add_rms_norm(*tensors[:4])
    died = [weakref.ref(tensor) for tensor in (*tensors, *results)]
    del tensors, results
    gc.collect()
    assert [reference() for reference in died] == [None] * 8


def test_what_is_never_like_itself_is_not_kept() -> None:
    x = rows(3, 8)
    for _ in range(3):
        add_rms_norm(x, x)
        rms_norm(torch.nn.Parameter(x, requires_grad=False))
    assert not prepared._calls
