# SPDX-License-Identifier: Apache-2.0
"""The implementations for JAX arrays, in the order in which they are tried."""

from normkit.registry import Implementation

TABLE = (
    Implementation("ipex", "normkit.vendors.ipex", automatic=("xpu",)),
    Implementation("vllm", "normkit.vendors.vllm", automatic=("rocm", "xpu")),
    Implementation("triton", "normkit_jax.launch", automatic=("cuda", "rocm")),
    Implementation("cpu", "normkit_jax.cpu", automatic=("cpu",)),
    Implementation("reference", "normkit.reference"),
)
