# SPDX-License-Identifier: Apache-2.0
"""Weights from mappings, foreign objects and safetensors files, and the errors of each."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from normkit import CheckpointError, DeviceError, MappingWeights, MissingTensorError, OptionError, SafetensorsWeights
from normkit.checkpoint import as_weights
from normkit.errors import UnsupportedError

NORM = "model.layers.0.input_layernorm.weight"
TENSORS = {
    NORM: np.linspace(0.5, 1.5, 16, dtype=np.float32),
    "model.layers.0.post_attention_layernorm.weight": np.ones(16, ml_dtypes.bfloat16),
    "model.norm.weight": np.arange(16, dtype=np.float16),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A safetensors file of three dtypes."""
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    numpy.save_file(TENSORS, path)
    return path


def test_mapping_returns_the_very_tensor() -> None:
    weights = MappingWeights(TENSORS)
    assert weights.get_tensor(NORM) is TENSORS[NORM]
    assert weights.names() == tuple(TENSORS)


def test_mapping_may_make_tensors_on_demand() -> None:
    class Lazy(UserDict[str, str]):
        def __missing__(self, name: str) -> str:
            return f"made {name}"

    assert MappingWeights(Lazy()).get_tensor("a") == "made a"


def test_missing_name_in_a_mapping_names_it_and_the_closest() -> None:
    with pytest.raises(MissingTensorError) as caught:
        MappingWeights(TENSORS).get_tensor("model.layers.0.input_layer_norm.weight")
    message = str(caught.value)
    assert "'model.layers.0.input_layer_norm.weight'" in message
    assert f"'{NORM}'" in message
    assert not message.startswith(("'", '"')), "KeyError would print the repr"
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)


def test_missing_name_with_nothing_close() -> None:
    with pytest.raises(MissingTensorError, match=r"'zzz'.*3 names no name is close"):
        MappingWeights(TENSORS).get_tensor("zzz")


def test_as_weights_wraps_mappings_and_keeps_objects_with_get_tensor() -> None:
    class Foreign(dict[str, Any]):
        def get_tensor(self, name: str) -> Any:
            raise RuntimeError(f"weight {name} does not exist")

    foreign = Foreign()
    assert as_weights(foreign) is foreign
    with pytest.raises(RuntimeError, match="weight a does not exist"):
        as_weights(foreign).get_tensor("a")
    assert as_weights(UserDict(TENSORS)).get_tensor(NORM) is TENSORS[NORM]


@pytest.mark.parametrize("wrong", [None, 3, [("a", 1)], "model.safetensors", Path("model.safetensors")])
def test_as_weights_rejects_everything_else(wrong: object) -> None:
    with pytest.raises(CheckpointError, match=f"got {type(wrong).__name__}") as caught:
        as_weights(wrong)
    assert ("SafetensorsWeights('model.safetensors')" in str(caught.value)) is isinstance(wrong, str | Path)


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_safetensors_values_dtypes_and_types(file: Path, framework: str) -> None:
    module = pytest.importorskip(framework)
    weights = SafetensorsWeights(file, framework=framework)
    assert set(weights.names()) == set(TENSORS)
    for name, expected in TENSORS.items():
        tensor = weights.get_tensor(name)
        assert isinstance(tensor, getattr(module, {"numpy": "ndarray", "torch": "Tensor", "jax": "Array"}[framework]))
        assert str(tensor.dtype).removeprefix("torch.") == expected.dtype.name
        as_float = tensor.float().numpy() if framework == "torch" else np.asarray(tensor, np.float32)
        np.testing.assert_array_equal(as_float, expected.astype(np.float32))


def test_safetensors_device(file: Path) -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    device = jax.devices()[-1]
    assert SafetensorsWeights(file, "jax", device).get_tensor(NORM).devices() == {device}
    assert SafetensorsWeights(file, "torch", torch.device("cpu")).get_tensor(NORM).device.type == "cpu"


@pytest.mark.parametrize(
    ("framework", "device"), [("numpy", "cuda:0"), ("torch", "cuda:99"), ("torch", "nonsense"), ("jax", "nonsense")]
)
def test_a_device_that_is_not_there(file: Path, framework: str, device: str) -> None:
    pytest.importorskip(framework)
    with pytest.raises(DeviceError, match=device):
        SafetensorsWeights(file, framework, device)


def test_several_files_and_a_folder(file: Path) -> None:
    from safetensors.numpy import save_file

    other = file.with_name("second.safetensors")
    save_file({"lm_head.weight": np.zeros((2, 3), np.float32)}, other)
    ways: tuple[Any, ...] = ([str(file), other], (path for path in (file, other)), file.parent, str(file.parent))
    for paths in ways:
        weights = SafetensorsWeights(paths)
        assert weights.get_tensor("lm_head.weight").shape == (2, 3)
        np.testing.assert_array_equal(weights.get_tensor(NORM), TENSORS[NORM])


def test_missing_name_in_files_names_the_file_too(file: Path) -> None:
    with pytest.raises(MissingTensorError) as caught:
        SafetensorsWeights(file).get_tensor("model.norm.weights")
    for part in ("'model.norm.weights'", "'model.norm.weight'", str(file)):
        assert part in str(caught.value)


def test_the_same_name_in_two_files(file: Path) -> None:
    from safetensors.numpy import save_file

    other = file.with_name("other.safetensors")
    save_file({NORM: np.zeros(2, np.float32)}, other)
    with pytest.raises(CheckpointError, match=r"is in two files.*model\.safetensors and .*other\.safetensors"):
        SafetensorsWeights([file, other])


def test_repr(file: Path) -> None:
    assert repr(SafetensorsWeights(file)) == f"SafetensorsWeights(3 tensors of {file}, framework='numpy')"


def test_unknown_framework(file: Path) -> None:
    with pytest.raises(OptionError, match=r"'tensorflow'.*'numpy', 'torch', 'jax'"):
        SafetensorsWeights(file, framework="tensorflow")


def _damage(file: Path, kind: str) -> bytes:
    whole = file.read_bytes()
    return {
        "empty": b"",
        "text": b"this is text, not tensors\n" * 20,
        "pickle": pickle.dumps({NORM: [1.0]}),
        "header only": whole[:40],
        "one byte short": whole[:-1],
        "half": whole[: len(whole) // 2],
        "one byte long": whole + b"\0",
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "pickle", "header only", "one byte short", "half", "one byte long"])
def test_damaged_files_are_named_before_any_tensor(file: Path, kind: str) -> None:
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(_damage(file, kind))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsWeights([file, damaged])
    message = str(caught.value)
    assert str(damaged) in message
    assert ("truncated" if kind == "one byte short" else "safetensors") in message


def test_missing_file_empty_folder_and_no_path(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(CheckpointError, match=r"nothere\.safetensors: there is no such file"):
        SafetensorsWeights(tmp_path / "nothere.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        SafetensorsWeights(tmp_path)
    with pytest.raises(CheckpointError, match="paths is empty"):
        SafetensorsWeights([])


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    proof = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    bad = tmp_path / "pytorch_model.bin"
    bad.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        SafetensorsWeights(bad)
    with pytest.raises(CheckpointError, match="no other format is read"):
        SafetensorsWeights(tmp_path)
    assert not proof.exists()


def test_without_safetensors_the_error_says_how_to_get_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UnsupportedError, match="pip install safetensors"):
        SafetensorsWeights(file)


def test_importing_the_module_imports_no_framework_and_no_safetensors() -> None:
    code = (
        "import sys, normkit.checkpoint, normkit.demo\n"
        "print({'torch', 'jax', 'transformers', 'safetensors', 'gguf', 'tqdm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
