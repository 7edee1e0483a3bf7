# SPDX-License-Identifier: Apache-2.0
"""The torch modules: loading, exchange of state dicts with the modules they replace, the patch of nn.LayerNorm, the drop-in."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normkit import MappingWeights, MissingTensorError, NormkitError, OptionError, SafetensorsWeights, ShapeError

from .frameworks import installed

if "torch" not in installed():
    pytest.skip("torch is not installed", allow_module_level=True)

import torch
from torch import Tensor, nn

import normkit_torch
from normkit_torch import FastLayerNorm, FastRMSNorm

ROOT = Path(__file__).parent.parent


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors() -> dict[str, Tensor]:
    return {"norm.weight": rows(16), "norm.bias": rows(16, seed=1), "other.weight": rows(8)}


class Foreign:
    """A checkpoint as inference servers have them."""

    def get_tensor(self, name: str) -> Tensor:
        if name not in tensors():
            raise RuntimeError(f"weight {name} does not exist")
        return tensors()[name]


@pytest.fixture(params=["dict", "mapping", "foreign", "safetensors"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "safetensors":
        save = pytest.importorskip("safetensors.torch")
        save.save_file(tensors(), tmp_path / "model.safetensors")
        return SafetensorsWeights(tmp_path, framework="torch")
    return {"dict": tensors(), "mapping": MappingWeights(tensors()), "foreign": Foreign()}[request.param]


def test_load(weights: Any) -> None:
    rms = FastRMSNorm.load("norm", weights, eps=1e-5)
    layer = FastLayerNorm.load("norm", weights, eps=1e-3)
    no_bias = FastLayerNorm.load_no_bias("norm", weights, eps=1e-3)
    assert FastRMSNorm.load("norm", weights).eps == 1e-6
    assert (rms.eps, layer.eps, no_bias.eps) == (1e-5, 1e-3, 1e-3)
    assert no_bias.bias is None
    for norm in (rms, layer, no_bias):
        assert isinstance(norm.weight, nn.Parameter) and norm.weight.requires_grad
        assert torch.equal(norm.weight, tensors()["norm.weight"])
    assert torch.equal(layer.bias, tensors()["norm.bias"])
    assert layer.normalized_shape == no_bias.normalized_shape == (16,)


def test_load_takes_options_and_checks_them_at_once() -> None:
    norm = FastRMSNorm.load("norm", tensors(), rounding="hf", weight_offset=1.0, implementation="reference")
    assert (norm.rounding, norm.weight_offset, norm.implementation) == ("hf", 1.0, "reference")
    assert FastLayerNorm.load("norm", tensors(), 1e-5, rounding="stored").rounding == "stored"
    with pytest.raises(OptionError, match="'none'"):
        FastLayerNorm.load("norm", tensors(), 1e-5, rounding="none")
    with pytest.raises(OptionError, match="eps must be a finite number, got 'a'"):
        FastRMSNorm(torch.ones(16), eps="a")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean 'reference'"):
        FastRMSNorm.load("norm", tensors(), implementation="referenc")


def test_a_missing_tensor_is_named() -> None:
    for load in (FastRMSNorm.load, FastLayerNorm.load, FastLayerNorm.load_no_bias):
        with pytest.raises(MissingTensorError, match=r"'nrm\.weight'.*'norm\.weight'"):
            load("nrm", tensors(), 1e-5)
        with pytest.raises(RuntimeError, match=r"weight nrm\.weight does not exist"):
            load("nrm", Foreign(), 1e-5)
        with pytest.raises(NormkitError, match="NoneType"):
            load("norm", None, 1e-5)  # type: ignore[arg-type]
    with pytest.raises(MissingTensorError, match=r"'other\.bias'"):
        FastLayerNorm.load("other", tensors(), 1e-5)


@pytest.mark.parametrize("residual", [None, "given"])
def test_forward(residual: str | None) -> None:
    hidden, stream = rows(3, 16), rows(3, 16, seed=2) if residual else None
    rms, layer = FastRMSNorm.load("norm", tensors(), 1e-5), FastLayerNorm.load("norm", tensors(), 1e-5)
    with torch.no_grad():
        h = hidden if stream is None else hidden + stream
        for norm, theirs in (
            (rms, nn.functional.rms_norm(h, (16,), rms.weight, 1e-5)),
            (layer, nn.functional.layer_norm(h, (16,), layer.weight, layer.bias, 1e-5)),
        ):
            normed, residual_out = norm(hidden) if stream is None else norm(hidden, stream)
            torch.testing.assert_close(normed, theirs)
            assert torch.equal(residual_out, h)
            assert (residual_out is hidden) == (stream is None)


def test_state_dicts_are_those_of_the_modules_replaced() -> None:
    for theirs, ours in (
        (nn.LayerNorm(16), FastLayerNorm(16)),
        (nn.LayerNorm(16, bias=False), FastLayerNorm(16, bias=False)),
        (nn.LayerNorm(16, elementwise_affine=False), FastLayerNorm(16, elementwise_affine=False)),
        (nn.RMSNorm(16), FastRMSNorm(torch.zeros(16))),
    ):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(rows(16))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(rows(3, 16))[0], theirs(rows(3, 16)), rtol=1e-5, atol=1e-3)
        theirs.load_state_dict(ours.state_dict())


def test_state_dict_of_hugging_face() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = llama.LlamaRMSNorm(16, eps=1e-6)
    theirs.load_state_dict({"weight": rows(16)})
    ours = FastRMSNorm.load("input_layernorm", {f"input_layernorm.{k}": v for k, v in theirs.state_dict().items()})
    torch.testing.assert_close(ours(rows(3, 16))[0], theirs(rows(3, 16)))
    theirs.load_state_dict(ours.state_dict())


def test_fast_layer_norm_is_a_layer_norm_of_one_dimension() -> None:
    assert isinstance(FastLayerNorm(16), nn.LayerNorm)
    assert FastLayerNorm([16]).normalized_shape == FastLayerNorm(torch.Size([16])).normalized_shape == (16,)
    assert FastLayerNorm(16, 1e-3, dtype=torch.float64, device="meta").weight.is_meta
    with pytest.raises(ShapeError, match=r"last dimension only.*\[4, 4\]"):
        FastLayerNorm([4, 4])
    with pytest.raises(ShapeError, match=r"\(hidden_size,\), got \(4, 4\)"):
        FastRMSNorm(torch.ones(4, 4))


def test_a_parameter_is_kept_and_a_tensor_becomes_one() -> None:
    parameter = nn.Parameter(torch.ones(4), requires_grad=False)
    assert FastRMSNorm(parameter).weight is parameter
    tensor = torch.ones(4)
    norm = FastRMSNorm(tensor)
    assert norm.weight.data_ptr() == tensor.data_ptr() and [name for name, _ in norm.named_parameters()] == ["weight"]


def test_conversion_to_other_dtypes_and_devices() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        norms: tuple[nn.Module, ...] = (FastRMSNorm.load("norm", tensors()), FastLayerNorm.load("norm", tensors(), 1e-5))
        for norm in norms:
            converted = norm.half() if dtype == torch.float16 else norm.to(dtype)
            assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
            normed, residual = converted(rows(3, 16).to(dtype), rows(3, 16).to(dtype))
            assert normed.dtype == residual.dtype == dtype
    on_meta = FastRMSNorm.load("norm", tensors()).to("meta")
    assert on_meta(torch.empty(3, 16, device="meta"))[0].shape == (3, 16)


def test_repr() -> None:
    assert repr(FastRMSNorm(torch.ones(16), 1e-5)) == "FastRMSNorm(16, eps=1e-05)"
    assert repr(FastRMSNorm(torch.ones(16), weight_offset=1.0)) == "FastRMSNorm(16, eps=1e-06, weight_offset=1.0)"
    assert repr(FastLayerNorm(16)).startswith("FastLayerNorm((16,), eps=1e-05, elementwise_affine=True")
    chosen: dict[str, Any] = {"rounding": "hf", "implementation": "reference"}
    for norm in (FastRMSNorm(torch.ones(16), **chosen), FastLayerNorm(16, **chosen)):
        assert repr(norm).endswith(", rounding='hf', implementation='reference')")


def test_copies_and_pickles() -> None:
    for norm in (FastRMSNorm.load("norm", tensors(), rounding="hf"), FastLayerNorm.load("norm", tensors(), 1e-3)):
        for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert type(again) is type(norm) and again.eps == norm.eps and again.rounding == norm.rounding
            assert again.weight.data_ptr() != norm.weight.data_ptr()
            assert torch.equal(again(rows(3, 16))[0], norm(rows(3, 16))[0])


def test_training_takes_the_same_step_as_the_modules_replaced() -> None:
    def step(norm: nn.Module, head: nn.Linear) -> tuple[list[Tensor], Tensor]:
        optimiser = torch.optim.SGD([*norm.parameters(), *head.parameters()], lr=0.1)
        result = norm(rows(5, 16))
        loss = (head(result[0] if isinstance(result, tuple) else result) - rows(5, 4, seed=3)).square().mean()
        loss.backward()
        optimiser.step()
        return list(norm.parameters()), loss

    for ours, theirs in ((FastLayerNorm(16), nn.LayerNorm(16)), (FastRMSNorm(torch.ones(16), 1e-5), nn.RMSNorm(16, 1e-5))):
        head = nn.Linear(16, 4)
        found, expected = step(ours, copy.deepcopy(head)), step(theirs, copy.deepcopy(head))
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found[0][0], torch.ones(16)), "the step must have moved the weight"


@pytest.fixture
def layer_norm_as_it_was() -> Iterator[None]:
    before = dict(vars(nn.LayerNorm))
    yield
    normkit_torch.unpatch_layer_norm()
    assert dict(vars(nn.LayerNorm)) == before


@pytest.mark.usefixtures("layer_norm_as_it_was")
def test_patch_gives_load_to_layer_norm_and_takes_it_back() -> None:
    assert not hasattr(nn.LayerNorm, "load") and not hasattr(nn.LayerNorm, "load_no_bias")
    for _ in range(2):
        normkit_torch.patch_layer_norm()
    loaded: Any = nn.LayerNorm
    norm = loaded.load("norm", tensors(), 1e-3)
    assert type(norm) is nn.LayerNorm and norm.eps == 1e-3
    assert torch.equal(norm.weight, tensors()["norm.weight"]) and torch.equal(norm.bias, tensors()["norm.bias"])
    assert loaded.load_no_bias(prefix="norm", weights=Foreign(), eps=1e-3).bias is None
    assert type(FastLayerNorm.load("norm", tensors(), 1e-3)) is FastLayerNorm
    for _ in range(2):
        normkit_torch.unpatch_layer_norm()
    assert not hasattr(nn.LayerNorm, "load") and not hasattr(nn.LayerNorm, "load_no_bias")


def test_patch_restores_what_another_library_had_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(cls: type[nn.LayerNorm]) -> str:
        return f"theirs: {cls.__name__}"

    monkeypatch.setattr(nn.LayerNorm, "load", classmethod(theirs), raising=False)
    before = vars(nn.LayerNorm)["load"]
    normkit_torch.patch_layer_norm()
    assert vars(nn.LayerNorm)["load"] is not before
    normkit_torch.unpatch_layer_norm()
    assert vars(nn.LayerNorm)["load"] is before
    assert nn.LayerNorm.load() == "theirs: LayerNorm"  # type: ignore[attr-defined]


DROP_IN = """
import torch
import normkit_torch
assert not hasattr(torch.nn.LayerNorm, "load"), "importing normkit_torch alone patches nothing"
from normkit_torch.lorax import FastLayerNorm, FastRMSNorm
weights = {"norm.weight": torch.rand(8), "norm.bias": torch.rand(8)}
rms = FastRMSNorm.load(prefix="norm", weights=weights, eps=1e-5)
assert rms.variance_epsilon == rms.eps == 1e-5 and rms.weight.shape == (8,) and not hasattr(rms, "bias")
rms.variance_epsilon = 1e-3
assert rms.eps == 1e-3
assert isinstance(rms, normkit_torch.FastRMSNorm)
for norm in (FastLayerNorm.load(prefix="norm", weights=weights, eps=1e-5), torch.nn.LayerNorm.load("norm", weights, 1e-5)):
    assert norm.eps == 1e-5 and torch.equal(norm.bias, weights["norm.bias"]) and norm.weight.shape == (8,)
assert torch.nn.LayerNorm.load_no_bias("norm", weights, 1e-5).bias is None
hidden = torch.rand(3, 8)
for norm in (rms, FastLayerNorm.load_no_bias("norm", weights, 1e-5)):
    normed, residual = norm(hidden, None)
    assert residual is hidden
    normed, residual = norm(hidden, residual)
    assert torch.equal(residual, hidden + hidden) and torch.equal(hidden, residual / 2)
assert "triton" not in __import__("sys").modules
"""


def test_the_drop_in() -> None:
    done = subprocess.run([sys.executable, "-c", DROP_IN], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
