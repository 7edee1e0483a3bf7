# SPDX-License-Identifier: Apache-2.0
"""A LLaMA decoder in JAX whose residual stream runs through normkit.

python examples/llama_jax.py --model FOLDER_OR_GGUF "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from normkit.checkpoint import Weights
from normkit_jax import FastRMSNorm


class Layer(NamedTuple):
    """The weights of one block. A NamedTuple is a pytree, and so is FastRMSNorm."""

    input_layernorm: FastRMSNorm
    q_proj: Array
    k_proj: Array
    v_proj: Array
    o_proj: Array
    post_attention_layernorm: FastRMSNorm
    gate_proj: Array
    up_proj: Array
    down_proj: Array


class Parameters(NamedTuple):
    """All weights."""

    embed_tokens: Array
    layers: list[Layer]
    norm: FastRMSNorm
    lm_head: Array


def load(config: Any, weights: Weights, dtype: Any = jnp.float32) -> Parameters:
    """Take the weights under their Hugging Face names."""

    def tensor(prefix: str) -> Array:
        return jnp.asarray(weights.get_tensor(f"{prefix}.weight"))

    def norm(prefix: str) -> FastRMSNorm:
        return FastRMSNorm.load(prefix=prefix, weights=weights, eps=config.rms_norm_eps)

    def layer(prefix: str) -> Layer:
        return Layer(
            input_layernorm=norm(f"{prefix}.input_layernorm"),
            q_proj=tensor(f"{prefix}.self_attn.q_proj"),
            k_proj=tensor(f"{prefix}.self_attn.k_proj"),
            v_proj=tensor(f"{prefix}.self_attn.v_proj"),
            o_proj=tensor(f"{prefix}.self_attn.o_proj"),
            post_attention_layernorm=norm(f"{prefix}.post_attention_layernorm"),
            gate_proj=tensor(f"{prefix}.mlp.gate_proj"),
            up_proj=tensor(f"{prefix}.mlp.up_proj"),
            down_proj=tensor(f"{prefix}.mlp.down_proj"),
        )

    embed_tokens = tensor("model.embed_tokens")
    layers = [layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
    lm_head = embed_tokens if config.tie_word_embeddings else tensor("lm_head")
    parameters = Parameters(embed_tokens, layers, norm("model.norm"), lm_head)
    converted: Parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
    return converted


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair (i, i + head_dim / 2) of x (tokens, heads, head_dim) by the angle of its position."""
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((left * cos - right * sin, right * cos + left * sin), axis=-1)


def attention(layer: Layer, x: Array, cos: Array, sin: Array, past: Array, start: Array) -> tuple[Array, Array]:
    """Attend from the new tokens, from position `start` on, to all; `past` is (2, size, kv_heads, head_dim)."""
    projected = (x @ layer.q_proj.T, x @ layer.k_proj.T, x @ layer.v_proj.T)
    q, k, v = (t.reshape(len(x), -1, past.shape[-1]) for t in projected)
    past = lax.dynamic_update_slice(past, jnp.stack((rotate(k, cos, sin), v)), (0, start, 0, 0))
    causal = jnp.arange(past.shape[1]) <= start + jnp.arange(len(x))[:, None]
    y = jax.nn.dot_product_attention(rotate(q, cos, sin)[None], past[:1], past[1:], mask=causal[None, None])
    return y.reshape(len(x), -1) @ layer.o_proj.T, past


def forward(config: Any, parameters: Parameters, ids: Array, cache: list[Array], start: Array) -> tuple[Array, list[Array]]:
    """Return the logits (tokens, vocabulary) of the tokens from position `start` on, and the cache with them."""
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (jnp.arange(0, config.head_dim, 2) / config.head_dim)
    angles = (start + jnp.arange(len(ids)))[:, None, None] * frequencies
    cos, sin = (t.astype(parameters.embed_tokens.dtype) for t in (jnp.cos(angles), jnp.sin(angles)))

    hidden, residual = parameters.embed_tokens[ids], None
    longer = []
    for layer, past in zip(parameters.layers, cache, strict=True):
        normed, residual = layer.input_layernorm(hidden, residual)
        hidden, past = attention(layer, normed, cos, sin, past, start)
        longer.append(past)
        normed, residual = layer.post_attention_layernorm(hidden, residual)
        hidden = (jax.nn.silu(normed @ layer.gate_proj.T) * (normed @ layer.up_proj.T)) @ layer.down_proj.T
    normed, _ = parameters.norm(hidden, residual)
    return normed @ parameters.lm_head.T, longer


class Llama:
    """The decoder: `config` has the attributes of a Hugging Face LlamaConfig, `weights` its tensor names."""

    def __init__(self, config: Any, weights: Weights) -> None:
        self.config, self.parameters = config, load(config, weights)
        self.forward = jax.jit(partial(forward, config), donate_argnames="cache")

    def new_cache(self, size: int) -> list[Array]:
        """Return room for the keys and values of `size` tokens, for each layer; jit wants a fixed size."""
        shape = (2, size, self.config.num_key_value_heads, self.config.head_dim)
        return [jnp.zeros(shape, self.parameters.embed_tokens.dtype) for _ in self.parameters.layers]

    def __call__(self, ids: Sequence[int]) -> Array:
        """Return the logits (tokens, vocabulary) of all tokens at once."""
        logits: Array
        logits, _ = self.forward(self.parameters, jnp.asarray(ids), self.new_cache(len(ids)), jnp.asarray(0))
        return logits

    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """Yield `tokens` token ids, each the most likely one after those before it; it does not stop by itself."""
        cache, start, ids = self.new_cache(len(prompt) + tokens), 0, jnp.asarray(prompt)
        for _ in range(tokens):
            logits, cache = self.forward(self.parameters, ids, cache, jnp.asarray(start))
            start, ids = start + len(ids), logits[-1:].argmax(axis=-1)
            yield int(ids[0])


def main() -> None:
    """Answer a prompt."""
    from normkit.models import read_model

    parser = argparse.ArgumentParser(description="Decode text with a LLaMA in JAX.")
    parser.add_argument("--model", required=True, help="a GGUF file, or a folder in Hugging Face layout")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("prompt")
    arguments = parser.parse_args()
    model = read_model(arguments.model)
    decoder = Llama(model.config, model.weights("jax"))
    for piece in model.stream(decoder.generate(model.encode(arguments.prompt), arguments.tokens)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
