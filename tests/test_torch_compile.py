# SPDX-License-Identifier: Apache-2.0
"""The functions under torch.compile, torch.export, fake tensors and the checks that torch has for operators."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import normkit_torch
from normkit import registry
from normkit_torch import FastLayerNorm, FastRMSNorm, prepared

# inductor imports parts of torch that use torch.jit, which torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(hidden: int = 24, dtype: torch.dtype = torch.float32, count: int = 5) -> list[Tensor]:
    """Return x, residual, weight and bias."""
    shapes = [(count, hidden)] * 2 + [(hidden,)] * 2
    return [rows(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


@KINDS
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_forward_and_backward_are_the_eager_ones(kind: str, backend: str) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    dy, dresidual_out = rows(5, 24, seed=7), rows(5, 24, seed=8)
    for asks in ((0, 1, 2, 3), (1,), (2,), ()):
        for without_residual in (False, True):
            results = []
            for call in (function, compiled):
                given: list[Tensor | None] = [tensor.requires_grad_(index in asks) for index, tensor in enumerate(operands())]
                if without_residual:
                    given[1] = None
                y, residual_out = call(*given)
                leaves = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
                outputs = [(y, dy), (residual_out, dresidual_out)]
                pairs = [(output, cotangent) for output, cotangent in outputs if output.requires_grad]
                gradients: tuple[Tensor, ...] = ()
                if leaves and pairs:
                    differentiated, given_cotangents = zip(*pairs, strict=True)
                    gradients = torch.autograd.grad(differentiated, leaves, given_cotangents)
                results.append([y, residual_out, *gradients])
            for found, expected in zip(*reversed(results), strict=True):
                assert torch.equal(found, expected)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_roundings_are_the_eager_ones(kind: str, dtype: torch.dtype) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    for rounding in (None, "sum", "stored", "hf"):

        def call(*tensors: Tensor, rounding: str | None = rounding) -> Any:
            return function(*tensors, rounding=rounding, out_dtype=torch.float32, residual_dtype=dtype)

        given = operands(dtype=dtype)
        for found, expected in zip(torch.compile(call, fullgraph=True)(*given), call(*given), strict=True):
            assert torch.equal(found, expected) and found.dtype == expected.dtype


@KINDS
def test_compiled_in_place(kind: str) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm_")

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, residual_out = function(2 * x, residual, weight)
        return y + 1, residual_out

    x, residual, weight, _ = operands()
    expected_residual = residual.clone()
    expected = block(x, expected_residual, weight)
    given = residual.clone()
    found = torch.compile(block, fullgraph=True)(x, given, weight)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(given, expected_residual) and not torch.equal(given, residual)
    compiled: Any = torch.compile(function, fullgraph=True)
    y, residual_out = compiled(x, given, weight)
    assert y is x and residual_out is given


@KINDS
@pytest.mark.parametrize("gradient", [False, True])
def test_rows_may_change_without_compiling_again(kind: str, gradient: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(normkit_torch, f"add_{kind}_norm")
    for dynamic, calls_to_learn in ((True, 1), (None, 2)):
        torch.compiler.reset()
        compiled: Any = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
        counts = []
        for count in (3, 4, 7, 100, 33):
            given = [tensor.requires_grad_(gradient) for tensor in operands(count=count)]
            for found, expected in zip(compiled(*given), function(*given), strict=True):
                assert torch.equal(found, expected)
            counts.append(counter.frame_count)
        # without being told, torch learns from the second call that the number of rows varies
        assert len(set(counts[calls_to_learn - 1 :])) == 1, counts


def test_without_gradients() -> None:
    compiled: Any = torch.compile(normkit_torch.add_rms_norm, fullgraph=True, backend="aot_eager")
    given = [tensor.requires_grad_() for tensor in operands()]
    expected = normkit_torch.add_rms_norm(*given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = compiled(*given)
        assert not found[0].requires_grad and not found[1].requires_grad
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


class Block(nn.Module):
    """Two norms, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FastRMSNorm(rows(24))
        self.second = FastLayerNorm(24)
        self.linear = nn.Linear(24, 24)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed, residual = self.first(hidden, residual)
        normed, residual = self.second(self.linear(normed), residual)
        return normed, residual


@pytest.mark.parametrize("residual", [False, True])
def test_modules_train_compiled_as_they_do_eagerly(residual: bool) -> None:
    results = []
    torch.manual_seed(0)
    block = Block()
    for compiled in (False, True):
        module = copy.deepcopy(block)
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        normed, stream = call(rows(5, 24), rows(5, 24, seed=1) if residual else None)
        torch.autograd.backward([normed, stream], [rows(5, 24, seed=2), rows(5, 24, seed=3)])
        results.append([normed, stream, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export_and_run_with_other_rows(strict: bool) -> None:
    block = Block().eval()
    count = torch.export.Dim("count")
    program = torch.export.export(
        block, (rows(5, 24), rows(5, 24)), dynamic_shapes={"hidden": {0: count}, "residual": {0: count}}, strict=strict
    )
    assert sum(str(node.target) == "normkit.norm.default" for node in program.graph.nodes) == 2
    again = program.module()
    for rows_now in (5, 2, 17):
        given = rows(rows_now, 24, seed=4), rows(rows_now, 24, seed=5)
        for found, expected in zip(again(*given), block(*given), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"eps": -1.0}, "at least 0"), ({"rounding": "stord"}, "'stord'"), ({"implementation": "referense"}, "did you mean")],
)
def test_errors_are_told_when_compiling(options: dict[str, Any], says: str) -> None:
    compiled = torch.compile(lambda x: normkit_torch.rms_norm(x, **options), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=says):
        compiled(rows(5, 24))


def test_shapes_are_checked_when_compiling() -> None:
    compiled = torch.compile(normkit_torch.add_rms_norm, fullgraph=True, backend="aot_eager")
    x = rows(5, 24)
    for wrong, says in (((x, rows(4, 24)), "residual must have shape"), ((x, None, rows(23)), "weight must have shape")):
        with pytest.raises(Exception, match=says):
            compiled(*wrong)


@KINDS
def test_fake_and_meta_tensors_give_shapes_and_dtypes(kind: str) -> None:
    function = getattr(normkit_torch, f"add_{kind}_norm")
    options = {"out_dtype": torch.float16, "residual_dtype": torch.float32}
    real = function(*operands(dtype=torch.bfloat16), **options)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in operands(dtype=torch.bfloat16)]
        fake = function(*fakes, **options)
        getattr(normkit_torch, f"add_{kind}_norm_")(*fakes)
    meta = function(*(tensor.to("meta") for tensor in operands(dtype=torch.bfloat16)), **options)
    for expected, *others in zip(real, fake, meta, strict=True):
        for other in others:
            assert (other.shape, other.dtype, other.stride()) == (expected.shape, expected.dtype, expected.stride())


@KINDS
def test_meta_tensors_in_place(kind: str) -> None:
    x, residual, weight, bias = (tensor.to("meta") for tensor in operands())
    y, residual_out = getattr(normkit_torch, f"add_{kind}_norm_")(x, residual, weight, bias)
    assert y is x and residual_out is residual


@pytest.mark.parametrize("inference", [False, True])
def test_an_operator_prepares_its_calls_too(inference: bool) -> None:
    """What runs in a compiled graph chooses once; versions are counted all the same, and inference mode is told apart."""
    chosen = []
    select = registry.select

    def noting(*arguments: Any, **options: Any) -> Any:
        chosen.append(arguments)
        return select(*arguments, **options)

    functional: Any = torch.compile(normkit_torch.add_rms_norm, fullgraph=True, backend="eager")
    in_place: Any = torch.compile(normkit_torch.add_rms_norm_, fullgraph=True, backend="eager")
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode(inference):
        patched.setattr(prepared, "_calls", {})
        patched.setattr(registry, "select", noting)
        for turn in range(3):
            x, residual, weight, bias = operands()
            expected = normkit_torch.add_rms_norm(x, residual, weight, bias, implementation="reference")
            before = len(chosen)
            results = *functional(x, residual, weight, bias), *in_place(x, residual, weight, bias)
            assert len(chosen) - before == (0 if turn else 2)
            for found, one in zip(results, expected * 2, strict=True):
                torch.testing.assert_close(found, one)
            assert inference or (x._version, residual._version) == (1, 1)
