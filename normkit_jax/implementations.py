# SPDX-License-Identifier: Apache-2.0
"""The implementations for JAX arrays, in the order in which they are tried."""

from normkit.registry import Implementation

TABLE = (
    Implementation("vllm", "normkit.vendors.vllm", automatic=("rocm",)),
    Implementation("ipex", "normkit.vendors.ipex", automatic=("xpu",)),
    Implementation("triton", "normkit_jax.launch", automatic=("cuda", "rocm")),
    Implementation("reference", "normkit.reference"),
)
