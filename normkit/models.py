# SPDX-License-Identifier: Apache-2.0
"""A LLaMA read through transformers, for `normkit demo` and the examples.

Needs the extra `normkit[demo]`; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import MappingWeights, SafetensorsWeights, Weights
from .errors import CheckpointError, MissingPackageError, UnsupportedError


@dataclass(frozen=True)
class Model:
    """A LLaMA checkpoint with what it takes to run it.

    Attributes:
        name: The name of its file or folder.
        config: The transformers LlamaConfig.
        tokenizer: The transformers tokenizer.
        weights: Opens the weights for a framework, "torch" or "jax", under their Hugging Face names.
        reference: Loads transformers' own LlamaForCausalLM with the same weights, in float32.
    """

    name: str
    config: Any
    tokenizer: Any
    weights: Callable[[str], Weights]
    reference: Callable[[], Any]

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, as a user's turn where the tokenizer has a chat template."""
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(prompt)["input_ids"])

    def stop_ids(self) -> set[int]:
        """Return the tokens that end an answer."""
        configured = self.config.eos_token_id
        several = configured if isinstance(configured, Sequence) else [configured]
        return {i for i in (*several, self.tokenizer.eos_token_id) if i is not None}

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield text as its tokens arrive, up to the end of the answer."""
        stop, ids, shown = self.stop_ids(), [], ""
        for token in tokens:
            if token in stop:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)
            # A character of several tokens decodes to U+FFFD until its last one is there.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text


def read_model(path: str | os.PathLike[str]) -> Model:
    """Read a LLaMA: a GGUF file, or a folder in Hugging Face layout (config.json, tokenizer, *.safetensors).

    Args:
        path: The file or the folder.

    Returns:
        The model; a folder's weights are opened only when they are asked for.

    Raises:
        CheckpointError: There is no such file, or it is neither of the two.
        UnsupportedError: It is not a plain LLaMA.
        MissingPackageError: A package of the extra `normkit[demo]` is not installed.
    """
    path = Path(path)
    if path.is_dir():
        model = _read_folder(path)
    elif not path.exists():
        raise CheckpointError(f"cannot read {path}: there is no such file; pass a GGUF file or a Hugging Face folder")
    else:
        model = read_gguf(path)
    _check_plain(model)
    return model


def read_gguf(path: Path) -> Model:
    """Read a LLaMA from a GGUF file; its tensors are dequantised to float32 in memory.

    Args:
        path: The file.

    Returns:
        The model; its weights and its reference share memory.

    Raises:
        CheckpointError: It is not a GGUF file, or transformers cannot read it.
        MissingPackageError: A package of the extra `normkit[demo]` is not installed.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"cannot read {path}: it is not a GGUF file")
    torch, transformers, *_ = require("torch", "transformers", "gguf", "accelerate")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    with _reading(path):
        reference = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    tensors = reference.state_dict()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Model(
        path.stem,
        reference.config,
        tokenizer,
        lambda framework: MappingWeights(tensors if framework == "torch" else arrays),
        lambda: reference,
    )


def require(*modules: str, extra: str = "demo") -> list[Any]:
    """Import modules of an extra of normkit.

    Args:
        modules: Their names.
        extra: Its name.

    Returns:
        The modules, in this order.

    Raises:
        MissingPackageError: One is not installed; the message has the pip command.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise MissingPackageError(
            f"this needs {', '.join(dict.fromkeys(modules))}: "
            f'pip install -e ".[{extra}]" in the folder of normkit\'s sources ({type(error).__name__}: {error})'
        ) from error


def _read_folder(path: Path) -> Model:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"folder {path} has no config.json; pass a folder in Hugging Face layout or a GGUF file")
    torch, transformers, _ = require("torch", "transformers", "safetensors")
    # Opened once for its errors: a damaged file shall be named before transformers meets it.
    SafetensorsWeights(path)
    with _reading(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)

    def reference() -> Any:
        with _reading(path):
            llama = transformers.LlamaForCausalLM
            return llama.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32).eval()

    return Model(path.name, config, tokenizer, lambda framework: SafetensorsWeights(path, framework), reference)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what transformers raises on a damaged or incomplete model into an error that names it."""
    # In a log each step of a progress bar would be a line.
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stderr(bars):
            yield
    # Which exception its parsers raise depends on the byte where a file is cut off.
    except Exception as error:
        raise CheckpointError(f"transformers cannot read {path}: {type(error).__name__}: {error}") from error


def _check_plain(model: Model) -> None:
    config = model.config
    if config.model_type != "llama":
        raise UnsupportedError(f"{model.name} is a {config.model_type} model; the decoder here is a LLaMA")
    rope_type = config.rope_parameters.get("rope_type", "default")
    found = {
        "rope_type": (rope_type, "default"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "hidden_act": (config.hidden_act, "silu"),
    }
    for name, (value, plain) in found.items():
        if value != plain:
            raise UnsupportedError(f"{model.name} has {name}={value!r}; the decoder here does only {plain!r}")
