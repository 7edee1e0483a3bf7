# SPDX-License-Identifier: Apache-2.0
"""The torch operators: what torch checks of them, and which of them a graph has."""

from __future__ import annotations

from typing import Any

import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import normkit_torch
from normkit import OptionError
from normkit_torch import dispatch, library, prepared

from .test_torch_compile import operands, rows

# inductor imports parts of torch that use torch.jit, which torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


def test_what_runs_in_a_graph_is_only_what_is_computed() -> None:
    """Forward and backward are traced to the operators below autograd."""
    names: list[list[str]] = []

    def noting(graph: Any, _: Any) -> Any:
        names.append([str(node.target) for node in graph.graph.nodes if "normkit" in str(node.target)])
        return make_boxed_func(graph.forward)

    def two(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y, residual_out = normkit_torch.add_rms_norm(x, residual, weight, bias)
        return normkit_torch.layer_norm(y, weight), residual_out

    given = operands()
    compiled: Any = torch.compile(two, fullgraph=True, backend=aot_autograd(fw_compiler=noting, bw_compiler=noting))
    compiled(*given)
    with torch.inference_mode():
        compiled(*given)
    y, residual_out = compiled(*(tensor.requires_grad_() for tensor in given))
    torch.autograd.backward([y, residual_out], [rows(5, 24), rows(5, 24)])
    forms = [["norm_and_residual", "norm_alone"]] * 2 + [["norm_and_statistics"] * 2, ["norm_gradients"] * 2]
    assert names == [[f"normkit.{name}.default" for name in each] for each in forms]


def refuse(*_: Any) -> None:
    raise AssertionError("by torch's dispatcher")


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_graph_goes_past_the_dispatcher_where_the_public_functions_do(
    needs_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y, residual_out = normkit_torch.add_layer_norm(x, residual, weight, bias)
        return normkit_torch.rms_norm(y, weight), residual_out

    def given() -> list[Tensor]:
        return [tensor.requires_grad_(needs_grad) for tensor in operands()]

    compiled: Any = torch.compile(two, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the first one runs while torch's state is still that of compiling, which the guard sees
        expected = compiled(*given())
    monkeypatch.setattr(library, "_computed", refuse)
    torch.testing.assert_close(compiled(*given()), expected, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="by torch's dispatcher"):
        compiled(*(tensor.detach().double() for tensor in given()))


class SeenByDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.names.append(str(operator))
        return operator(*arguments, **(named or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.names.append(str(operator))
        return operator(*arguments, **(named or {}))


@pytest.mark.parametrize("mode", [SeenByDispatch, SeenByFunction])
def test_a_mode_sees_the_operator_of_a_prepared_call(mode: type[Any]) -> None:
    x, residual, weight, _ = operands()
    arguments = (x, residual, weight, None, "add_rms_norm", 1e-6, 0.0)
    operator = torch.ops.normkit.norm_and_residual.default
    expected = [operator(*arguments) for _ in range(3)][-1]
    with mode() as seen:
        found = operator(*arguments)
    assert "normkit.norm_and_residual.default" in seen.names
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        operator(x, residual, weight=weight, bias=None, function="add_rms_norm", eps=1e-6, weight_offset=0.0), expected
    )


def test_a_profiler_sees_the_operator_of_a_prepared_call() -> None:
    x, weight = rows(5, 24), rows(24)
    for _ in range(3):
        torch.ops.normkit.norm_alone.default(x, None, weight, None, "rms_norm", 1e-6, 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.normkit.norm_alone.default(x, None, weight, None, "rms_norm", 1e-6, 0.0)
    assert "normkit::norm_alone" in {event.name for event in profile.events()}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(24, 24)
        self.weight = torch.nn.Parameter(rows(24))

    def forward(self, x: Tensor) -> Tensor:
        y = normkit_torch.rms_norm(self.linear(x), self.weight)
        y, residual_out = normkit_torch.add_layer_norm(y, x, self.weight)
        return y + residual_out


# of torch itself, where it copies a program
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
@pytest.mark.parametrize("how", ["decomposed", "without gradients"])
def test_a_graph_of_inference_has_gradients_where_they_are_asked_for(how: str) -> None:
    x, model = rows(5, 24), Model()
    if how == "decomposed":
        program = torch.export.export(model, (x,)).run_decompositions({})
    else:
        with torch.no_grad():
            program = torch.export.export(model, (x,))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    module = program.module()
    for _ in range(3):
        found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(sorted(map(norm_of, found)), sorted(map(norm_of, expected)))


def norm_of(gradient: Tensor) -> float:
    return float(gradient.double().norm())


@pytest.mark.parametrize("function", [3, None])
def test_a_function_that_is_no_word_is_an_error_of_the_schema(function: Any) -> None:
    with pytest.raises((RuntimeError, TypeError), match="function"):
        torch.ops.normkit.norm_alone.default(rows(5, 24), None, rows(24), None, function, 1e-6, 0.0)


WANTED = ([True] * 4, [True, False, True, True], [False, True, False, False], [True, False, False, True])


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("name", ["norm_backward", "norm_gradients"])
def test_gradients_like_those_before_choose_nothing_and_have_the_same_bits(
    name: str, wanted: list[bool], residual_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for: also both of x and of a residual of its dtype, which are then two tensors."""
    x, residual, weight, _ = operands()
    if not {one.name: one for one in normkit_torch.explain("rms_norm", x)}["cpu"].accepted:
        pytest.skip("the cpu implementation does not run here")
    dtype = str(residual_dtype).removeprefix("torch.")
    kind = f"layer x_dtype=float32 residual_dtype={dtype} bias_dtype=float32 residual_out_dtype={dtype} implementation=cpu"
    h = residual.to(residual_dtype)
    given = (x, h.clone(), h, weight, x.mean(-1), rows(5).exp(), kind, 1e-5, 0.0)
    operator = getattr(torch.ops.normkit, name)
    prepared.forget()
    first = operator(*given, wanted)
    for other in WANTED:
        operator(*given, other)
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "backward", None)
        again = operator(*given, wanted)
    assert len(again) == len(first) and all(map(torch.equal, again, first))
    assert [gradient.dtype for gradient in again] == [gradient.dtype for gradient in first]
    assert len({gradient.data_ptr() for gradient in again if gradient.numel()}) == sum(wanted)


@pytest.mark.parametrize("function", ["add_rms_norm rouding=hf", "add_rms_norm  rounding=hf", "add_rms_norm hf"])
def test_words_that_are_none_are_refused(function: str) -> None:
    with pytest.raises(OptionError, match=r"followed by some of rounding=\.\.\."):
        torch.ops.normkit.norm_alone(rows(5, 24), None, None, None, function, 1e-6, 0.0)


def _operator_inputs() -> list[tuple[Any, tuple[Any, ...]]]:
    operators = torch.ops.normkit
    inputs: list[tuple[Any, tuple[Any, ...]]] = []
    for kind in ("rms", "layer"):
        for dtype, more in ((torch.float32, ""), (torch.bfloat16, " rounding=hf residual_dtype=float32")):
            x, residual, weight, bias = operands(dtype=dtype)
            options = (f"add_{kind}_norm" + more, 1e-5, 1.0)
            leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight, bias)]
            for operator in (operators.norm, operators.norm_and_residual, operators.norm_and_statistics):
                inputs += [
                    (operator.default, (x, residual, weight, bias, *options)),
                    (operator.default, (x[:0], residual[:0], weight, None, *options)),
                    (operator.default, (x.T.contiguous().T, residual, weight, None, *options)),
                ]
            for operator in (operators.norm, operators.norm_alone, operators.norm_and_statistics):
                inputs.append((operator.default, (x, None, None, None, f"{kind}_norm", 1e-5, 0.0)))
            inputs += [
                (operators.norm.default, (*leaves, *options)),
                (operators.norm.default, (leaves[0], None, leaves[2], None, *options)),
                (operators.norm.default, (leaves[0], None, leaves[2], None, f"{kind}_norm", 1e-5, 0.0)),
            ]
        x, residual, weight, bias = operands()
        inputs.append((operators.norm_.default, (x, residual, weight, bias, f"add_{kind}_norm_", 1e-5, 0.0)))
        mean = x.mean(-1) if kind == "layer" else None
        described = f"{kind} x_dtype=float32 residual_dtype=float16 bias_dtype=float32 residual_out_dtype=float16"
        for wanted in ([True, True, True, True], [False, True, False, False], [True, False, False, True]):
            given = (x, residual.half(), x.half(), weight, mean, rows(5).exp(), described, 1e-5, 0.0, wanted)
            inputs += [(operators.norm_backward.default, given), (operators.norm_gradients.default, given)]
    return inputs


@pytest.mark.parametrize("index", range(len(_operator_inputs())))
def test_opcheck(index: int) -> None:
    operator, given = _operator_inputs()[index]
    torch.library.opcheck(operator, given)


def test_a_function_that_there_is_not_is_refused() -> None:
    with pytest.raises(OptionError, match="'batch_norm' is not one of the functions rms_norm"):
        torch.ops.normkit.norm_alone(rows(5, 24), None, None, None, "batch_norm", 1e-6, 0.0)


def test_a_residual_that_there_is_not_is_empty_and_never_none() -> None:
    for _ in range(3):  # then by a call like the first
        _, residual_out = torch.ops.normkit.norm_and_residual.default(rows(5, 24), None, rows(24), None, "rms_norm", 1e-6, 0.0)
        assert residual_out.shape == (0,)


@pytest.mark.parametrize("eps", [0, 1])
def test_numbers_of_another_type_are_as_the_schema_takes_them(eps: int) -> None:
    """Such as in a graph that was written by hand: 1 and 1.0 are one key, and calls that are prepared tell types apart."""
    x = rows(5, 24)
    for _ in range(2):
        given = x, None, None, None, "rms_norm"
        assert torch.equal(*(torch.ops.normkit.norm_alone.default(*given, number, 0.0) for number in (eps, float(eps))))
