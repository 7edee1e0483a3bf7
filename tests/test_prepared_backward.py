# SPDX-License-Identifier: Apache-2.0
"""A backward pass like one before is launched at once, with the same bits; another is treated as if there had been none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from .at_once import at_once
from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import normkit_torch
from normkit import DtypeError
from normkit.cpu import library
from normkit.errors import LaunchError
from normkit.prepared import in_python
from normkit_torch import add_layer_norm, add_rms_norm, cpu, dispatch, gradient, layer_norm, prepared

from .test_prepared import BF16, F16, F32, _nothing_prepared, assert_alike, chosen, rows

__all__ = ["_nothing_prepared", "chosen"]  # the fixtures

if not {v.name: v for v in normkit_torch.explain("rms_norm", torch.ones(2, 8))}["cpu"].accepted or torch.cuda.is_available():
    pytest.skip("the cpu implementation does not run here", allow_module_level=True)

NAMES = ("x", "residual", "weight", "bias")
Gradients = tuple[Tensor, ...]


class Logged(Tensor):
    pass


class Seen(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def leaves(dtypes: tuple[torch.dtype, ...] = (F32, F32, F32), asks: tuple[str, ...] = NAMES, count: int = 5) -> list[Tensor]:
    x, stream, affine = dtypes
    made = [rows(count, 24, dtype=x), rows(count, 24, dtype=stream, seed=1)]
    made += [rows(24, dtype=affine, seed=2), rows(24, dtype=affine, seed=3)]
    return [tensor.requires_grad_(name in asks) for name, tensor in zip(NAMES, made, strict=True)]


def backward(
    function: Any = add_layer_norm,
    given: list[Tensor] | None = None,
    change: Callable[[Tensor], Any] = lambda dy: dy,
    pack: Callable[[Tensor], Any] | None = None,
) -> Gradients:
    """Return the gradients of a call, whose dy may be another one, and so may what it saves."""
    given = given or leaves()
    with saved_tensors_hooks(lambda saved: saved, pack or (lambda saved: saved)):
        y, residual_out = function(*given)
    outputs, grads = [y], [change(rows(*y.shape, dtype=y.dtype, seed=7))]
    if residual_out.requires_grad:
        outputs, grads = [y, residual_out], [*grads, rows(*y.shape, dtype=residual_out.dtype, seed=8)]
    return torch.autograd.grad(outputs, [tensor for tensor in given if tensor.requires_grad], grads)


def prepared_and_then(*arguments: Any, **options: Any) -> Gradients:
    for _ in range(2):
        backward(*arguments[:2], **{name: value for name, value in options.items() if name == "given"})
    return backward(*arguments, **options)


def assert_as_if_new(**options: Any) -> None:
    """What is computed after others were prepared is what is computed first."""
    expected = backward(**options)
    prepared.forget()
    assert_alike(prepared_and_then(**options), expected)


@pytest.mark.parametrize("function", [add_rms_norm, add_layer_norm])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, F16), (F32, F16, BF16), (F16, F16, F32)])
@pytest.mark.parametrize("asks", [NAMES, ("x",), ("residual",), ("weight",), ("bias",), ("x", "weight"), ("residual", "bias")])
def test_the_second_pass_chooses_nothing_and_gives_the_same_bits(
    function: Any, dtypes: tuple[torch.dtype, ...], asks: tuple[str, ...], chosen: list[str]
) -> None:
    first = backward(function, leaves(dtypes, asks))
    assert chosen == ["cpu", "cpu"]
    for _ in range(2):
        assert_alike(backward(function, leaves(dtypes, asks)), first)
    assert chosen == ["cpu", "cpu"]
    assert [gradient.dtype for gradient in first] == [
        dtype for name, dtype in zip(NAMES, (*dtypes, dtypes[2]), strict=True) if name in asks
    ]


def test_what_is_asked_is_part_of_it() -> None:
    """Calls that differ in nothing that the tensors of the backward pass show."""
    whole = dict(zip(NAMES, backward(), strict=True))
    for _ in range(2):
        for asks in (("x", "weight"), NAMES, ("x", "weight", "bias"), ("residual", "weight")):
            assert_alike(backward(given=leaves(asks=asks)), tuple(whole[name] for name in asks))


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "strided": lambda dy: rows(5, 48, dtype=dy.dtype)[:, ::2],
    "transposed": lambda dy: rows(24, 5, dtype=dy.dtype).t(),
    "rows apart": lambda dy: rows(5, 30, dtype=dy.dtype)[:, :24],
    "expanded": lambda dy: rows(1, 1, dtype=dy.dtype).expand(5, 24),
    "a lazy sign": torch._neg_view,
    "a subclass": lambda dy: dy.as_subclass(Logged),
    "zeros that are not there": lambda dy: torch._efficientzerotensor(dy.shape, dtype=dy.dtype),
    "that of residual_out": lambda dy: rows(5, 24, dtype=dy.dtype, seed=8),
    "none": lambda dy: None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_kind_of_dy(name: str) -> None:
    def plain(gradients: Gradients) -> Gradients:
        return tuple(gradient.as_subclass(Tensor).contiguous() for gradient in gradients)

    def found() -> Gradients:
        asks = leaves()
        if name == "none":
            for _ in range(2):
                backward()
            return torch.autograd.grad(add_layer_norm(*asks)[1], asks[:2], rows(5, 24, seed=8))
        return plain(backward(given=asks, change=CHANGES[name]))

    expected = found()
    prepared.forget()
    for _ in range(2):
        backward()
    for _ in range(2):
        assert_alike(found(), expected)


def test_dy_twice() -> None:
    """One tensor in two places, which the guard of a prepared call takes for another call."""
    given = leaves()
    expected = backward(given=given, change=lambda _: rows(5, 24, seed=8))
    for _ in range(3):
        dy = rows(5, 24, seed=8)
        assert_alike(torch.autograd.grad(add_layer_norm(*given), given, (dy, dy)), expected)


def of_shape(*shape: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda saved: change(saved) if saved.shape == shape else saved


@pytest.mark.parametrize("shape", [(5, 24), (24,), (5,)], ids=["h", "weight", "statistics"])
@pytest.mark.parametrize("change", [torch.zeros_like, lambda saved: saved.repeat_interleave(2, -1)[..., ::2], torch._neg_view])
def test_hooks_that_give_other_tensors(shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> None:
    assert_as_if_new(pack=of_shape(*shape, change=change))


@pytest.mark.parametrize("shape", [(5, 24), (24,), (5,)], ids=["h", "weight", "statistics"])
@pytest.mark.parametrize("change", [lambda saved: saved[..., :-1], Tensor.double, lambda saved: saved[None]])
def test_hooks_that_give_wrong_tensors(shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> None:
    for _ in range(2):
        backward()
    with pytest.raises(DtypeError, match="do not replace it between the two"):
        backward(pack=of_shape(*shape, change=change))


@pytest.mark.parametrize("times", [1, 3])
def test_a_mode_sees_the_operator(times: int) -> None:
    for _ in range(times):
        backward()
    given = leaves()
    results, grads = add_layer_norm(*given), (rows(5, 24, seed=7), rows(5, 24, seed=8))
    with Seen() as mode:
        found = torch.autograd.grad(results, given, grads)
    assert "normkit.norm_gradients.default" in mode.names
    assert_alike(found, backward())


def test_gradients_of_gradients_after_prepared_ones() -> None:
    def second() -> Gradients:
        given = leaves()
        first = torch.autograd.grad(add_layer_norm(*given), given, (rows(5, 24), rows(5, 24)), create_graph=True)
        return torch.autograd.grad(first[0], given[2], rows(5, 24, seed=9))

    expected = second()
    assert_alike(prepared_and_then(), backward())
    assert_alike(second(), expected)


def test_the_number_of_threads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_for: list[int] = []
    packed = library.packed_backward

    def noting(*arguments: Any) -> bytes:
        prepared_for.append(arguments[4])
        return packed(*arguments)

    monkeypatch.setattr(library, "packed_backward", noting)
    before = torch.get_num_threads()
    expected = backward(given=leaves(count=700))
    prepared_for.clear()
    prepared.forget()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert_alike(backward(given=leaves(count=700)), expected)
    finally:
        torch.set_num_threads(before)
    assert prepared_for == [1, 1, 2, 2], "for each number the first pass and what is kept of it"


def test_threads_at_once() -> None:
    counts = (1, 3, 700)
    expected = {count: backward(given=leaves(count=count)) for count in counts}
    prepared.forget()
    wrong: list[int] = []

    def work(_: int) -> None:
        for turn in range(100):
            count = counts[turn % len(counts)]
            if not all(map(torch.equal, backward(given=leaves(count=count)), expected[count])):
                wrong.append(count)

    at_once(work)
    assert not wrong


def test_a_launch_that_fails_is_chosen_anew(monkeypatch: pytest.MonkeyPatch, chosen: list[str]) -> None:
    def start(addresses: tuple[int, ...]) -> None:
        raise LaunchError("no longer")

    prepare = cpu.prepare
    monkeypatch.setattr(cpu, "prepare", lambda known: in_python(known, start) if known.wanted else prepare(known))
    first = backward()
    assert chosen == ["cpu", "cpu"] and prepared._calls
    assert_alike(backward(), first)
    assert chosen == ["cpu"] * 3
    assert_alike(backward(), first)
    assert chosen == ["cpu"] * 5, "after a failure nothing was kept but what followed"


def test_forgetting(chosen: list[str]) -> None:
    backward()
    prepared.forget()
    assert not prepared._calls
    backward()
    assert chosen == ["cpu"] * 4


def test_training_without_and_with_gradients_in_turn(chosen: list[str]) -> None:
    given = leaves()
    first = backward(given=given)
    plain = add_layer_norm(*(tensor.detach() for tensor in given))
    assert chosen == ["cpu"] * 3
    for _ in range(3):
        assert_alike(backward(given=given), first)
        with torch.no_grad():
            for found, expected in zip(add_layer_norm(*given), plain, strict=True):
                assert torch.equal(found, expected) and not found.requires_grad
        assert not any(result.requires_grad for result in add_layer_norm(*(tensor.detach() for tensor in given)))
    assert layer_norm(*given[:1]).requires_grad


def test_no_tensor_is_kept_alive() -> None:
    given = leaves()
    for _ in range(3):
        found = backward(given=given)
    died = [weakref.ref(tensor) for tensor in (*given, *found)]
    del given, found
    gc.collect()
    assert [reference() for reference in died] == [None] * 8


def test_an_operator_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    backward()
    monkeypatch.setattr(gradient, "gradient_arguments", None)
    monkeypatch.setattr(dispatch, "backward", None)
    backward()
