# SPDX-License-Identifier: Apache-2.0
"""Train a small LLaMA in JAX to repeat what it read, with the residual stream through normkit, on all devices there are.

python examples/jax_train.py --steps 100
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from normkit_jax import FastRMSNorm

VOCABULARY, HIDDEN, HEADS, BLOCKS, LENGTH = 32, 64, 2, 2, 8


class Block(NamedTuple):
    """The weights of one block. A NamedTuple is a pytree, and so is FastRMSNorm."""

    attention_norm: FastRMSNorm
    qkv: Array
    out: Array
    mlp_norm: FastRMSNorm
    gate_up: Array
    down: Array


class Model(NamedTuple):
    """All weights."""

    embedding: Array
    blocks: list[Block]
    norm: FastRMSNorm
    head: Array


class State(NamedTuple):
    """What a step changes: the model, and Adam's means of its gradients and of their squares."""

    model: Model
    mean: Model
    square: Model
    step: Array


def init(key: Array) -> State:
    """Return a random model, before the first step."""
    keys = iter(jax.random.split(key, 2 + 4 * BLOCKS))

    def matrix(rows: int, columns: int) -> Array:
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    def norm() -> FastRMSNorm:
        return FastRMSNorm(jnp.ones(HIDDEN))

    def block() -> Block:
        qkv, out = matrix(HIDDEN, 3 * HIDDEN), matrix(HIDDEN, HIDDEN)
        return Block(norm(), qkv, out, norm(), matrix(HIDDEN, 8 * HIDDEN), matrix(4 * HIDDEN, HIDDEN))

    model = Model(matrix(VOCABULARY, HIDDEN), [block() for _ in range(BLOCKS)], norm(), matrix(HIDDEN, VOCABULARY))
    zeros = jax.tree.map(jnp.zeros_like, model)
    return State(model, zeros, zeros, jnp.zeros((), jnp.int32))


def rotate(x: Array) -> Array:
    """Turn each pair (i, i + head_dim / 2) of x (batch, tokens, heads, head_dim) by the angle of its position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 100.0 ** (-jnp.arange(half) / half)
    left, right = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate((left * cos - right * sin, right * cos + left * sin), axis=-1)


def attention(block: Block, x: Array) -> Array:
    """Attend to the tokens before."""
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(x @ block.qkv, 3, axis=-1))
    return jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True).reshape(x.shape) @ block.out


def forward(model: Model, ids: Array) -> Array:
    """Return the logits (batch, tokens, vocabulary). Each norm adds what came before to the residual, and hands on both."""
    hidden, residual = model.embedding[ids], None
    for block in model.blocks:
        normed, residual = block.attention_norm(hidden, residual)
        hidden = attention(block, normed)
        normed, residual = block.mlp_norm(hidden, residual)
        gate, up = jnp.split(normed @ block.gate_up, 2, axis=-1)
        hidden = (jax.nn.silu(gate) * up) @ block.down
    normed, _ = model.norm(hidden, residual)
    return normed @ model.head


def loss_of(model: Model, ids: Array) -> Array:
    """Return the mean cross entropy of the second half of each row, which repeats the first."""
    logits = forward(model, ids[:, :-1])[:, LENGTH - 1 :]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, LENGTH:, None], axis=-1).mean()


@partial(jax.jit, donate_argnums=0)
def train(state: State, ids: Array, rate: float = 3e-3) -> tuple[State, Array]:
    """Take one step of Adam, and return the loss before it. The gradients are summed over the devices because ids is spread."""
    loss, gradient = jax.value_and_grad(loss_of)(state.model, ids)
    step = state.step + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, gradient)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, state.square, gradient)
    unbiased = rate * jnp.sqrt(1 - 0.99**step) / (1 - 0.9**step)
    model = jax.tree.map(lambda w, m, s: w - unbiased * m / (jnp.sqrt(s) + 1e-8), state.model, mean, square)
    return State(model, mean, square, step), loss


def batch(key: Array, rows: int) -> Array:
    """Return random rows, each written twice."""
    return jnp.tile(jax.random.randint(key, (rows, LENGTH), 0, VOCABULARY), 2)


def main() -> None:
    """Train, and print the loss."""
    parser = argparse.ArgumentParser(description="Train a small LLaMA in JAX to repeat what it read.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=128, help="in a batch, over all devices")
    parser.add_argument("--devices", type=int, default=jax.device_count())
    arguments = parser.parse_args()

    mesh = Mesh(jax.devices()[: arguments.devices], ("data",))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state = jax.jit(init, out_shardings=everywhere)(jax.random.key(0))
    for step in range(arguments.steps):
        ids = jax.device_put(batch(jax.random.key(step), arguments.rows), spread)
        state, loss = train(state, ids)
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:4}  loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
