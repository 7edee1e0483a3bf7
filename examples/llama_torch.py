# SPDX-License-Identifier: Apache-2.0
"""A LLaMA decoder in PyTorch whose residual stream runs through normkit.

python examples/llama_torch.py --model FOLDER_OR_GGUF "Why is the sky blue?"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.checkpoint import Weights
from normkit_torch import FastRMSNorm


class Linear(nn.Module):
    """A matrix product with the tensor `prefix`.weight."""

    def __init__(self, prefix: str, weights: Weights) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weights.get_tensor(f"{prefix}.weight")), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T."""
        return F.linear(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, prefix: str, weights: Weights, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(f"{prefix}.{i}_proj", weights) for i in "qkvo")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from the new tokens to all tokens; `past` is (2, kv_heads, past_tokens, head_dim)."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for t in projected)
        past = torch.cat((past, torch.stack((rotate(k, cos, sin), v))), dim=2)
        new, total = len(x), past.shape[2]
        causal = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin)[None], past[:1], past[1:], attn_mask=causal, enable_gqa=True)
        return self.o_proj(y[0].transpose(0, 1).flatten(1)), past


class Layer(nn.Module):
    """One block. Each norm adds what came before it to the residual stream, and normalises the sum."""

    def __init__(self, prefix: str, weights: Weights, config: Any) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = FastRMSNorm.load(prefix=f"{prefix}.input_layernorm", weights=weights, eps=eps)
        self.attention = Attention(f"{prefix}.self_attn", weights, config.head_dim)
        self.post_attention_layernorm = FastRMSNorm.load(prefix=f"{prefix}.post_attention_layernorm", weights=weights, eps=eps)
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(f"{prefix}.mlp.{name}_proj", weights) for name in ("gate", "up", "down")
        )

    def forward(
        self, hidden: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what this block adds to the residual stream, the stream so far, and the longer `past`."""
        normed, residual = self.input_layernorm(hidden, residual)
        hidden, past = self.attention(normed, cos, sin, past)
        normed, residual = self.post_attention_layernorm(hidden, residual)
        hidden = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return hidden, residual, past


class Llama(nn.Module):
    """The decoder: `config` has the attributes of a Hugging Face LlamaConfig, `weights` its tensor names."""

    def __init__(self, config: Any, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Linear("model.embed_tokens", weights)
        self.layers = nn.ModuleList(Layer(f"model.layers.{i}", weights, config) for i in range(config.num_hidden_layers))
        self.norm = FastRMSNorm.load(prefix="model.norm", weights=weights, eps=config.rms_norm_eps)
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else Linear("lm_head", weights)

    def forward(self, ids: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Return the logits (tokens, vocabulary) of the tokens that follow those in `cache`, and add them to it."""
        embeddings = self.embed_tokens.weight
        shape = (2, self.config.num_key_value_heads, 0, self.config.head_dim)
        cache = [] if cache is None else cache
        cache += [embeddings.new_empty(shape) for _ in self.layers[len(cache) :]]
        theta, head_dim = self.config.rope_parameters["rope_theta"], self.config.head_dim
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=ids.device) / head_dim)
        past_tokens = cache[0].shape[2]
        angles = torch.arange(past_tokens, past_tokens + len(ids), device=ids.device)[:, None] * frequencies
        cos, sin = angles.cos().to(embeddings.dtype), angles.sin().to(embeddings.dtype)

        hidden, residual = F.embedding(ids, embeddings), None
        for i, layer in enumerate(self.layers):
            hidden, residual, cache[i] = layer(hidden, residual, cos, sin, cache[i])
        normed, _ = self.norm(hidden, residual)
        logits: Tensor = self.lm_head(normed)
        return logits

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """Yield `tokens` token ids, each the most likely one after those before it; it does not stop by itself."""
        cache: list[Tensor] = []
        ids = torch.tensor(prompt, device=self.embed_tokens.weight.device)
        for _ in range(tokens):
            ids = self(ids, cache)[-1:].argmax(dim=-1)
            yield int(ids)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x (heads, tokens, head_dim) by the angle of its position."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def main() -> None:
    """Answer a prompt."""
    from normkit.models import read_model

    parser = argparse.ArgumentParser(description="Decode text with a LLaMA in PyTorch.")
    parser.add_argument("--model", required=True, help="a GGUF file, or a folder in Hugging Face layout")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("prompt")
    arguments = parser.parse_args()
    model = read_model(arguments.model)
    decoder = Llama(model.config, model.weights("torch")).float()
    for piece in model.stream(decoder.generate(model.encode(arguments.prompt), arguments.tokens)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
