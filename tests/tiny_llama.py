# SPDX-License-Identifier: Apache-2.0
"""A random LLaMA of 30,000 parameters with a tokenizer, as a Hugging Face folder and as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

END = "<|end|>"


def config(tied: bool = True) -> Any:
    """Return the configuration: 3 layers, 6 heads that share 2 key-value heads."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=272,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )


def model(seed: int = 0, tied: bool = True) -> Any:
    """Return transformers' LlamaForCausalLM with weights large enough that every part of it matters."""
    import torch
    from transformers import LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    reference = LlamaForCausalLM(config(tied)).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if "norm" in name else 0.3, generator=generator)
    return reference


def raw_tokenizer() -> Any:
    """Return a byte-level tokenizer with a few merges and an end-of-answer token (id 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=272,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(["the sky is blue and the sea is the sky", "there is the other one"] * 9, trainer)
    return raw


def tokenizer() -> Any:
    """Return the same for transformers, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(), eos_token=END)
    fast.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [answer] "
    return fast


def write_folder(folder: Path, reference: Any) -> Path:
    """Write a Hugging Face folder with config.json, tokenizer and model.safetensors."""
    reference.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, reference: Any) -> Path:
    """Write the model and its tokenizer as llama.cpp's converter does, in float32."""
    import gguf

    shape, words = reference.config, json.loads(raw_tokenizer().to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in reference.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), _permuted(name, tensor.numpy(), shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permuted(name: str, array: np.ndarray[Any, Any], shape: Any) -> np.ndarray[Any, Any]:
    """GGUF rotates neighbouring pairs of a head, Hugging Face its two halves: q and k rows change places."""
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
