# SPDX-License-Identifier: Apache-2.0
"""The implementations for NumPy arrays, in the order in which they are tried."""

from .registry import Implementation

TABLE = (
    Implementation("ipex", "normkit.vendors.ipex", automatic=()),
    Implementation("vllm", "normkit.vendors.vllm", automatic=()),
    Implementation("cpu", "normkit.cpu.numpy", automatic=("cpu",)),
    Implementation("reference", "normkit.reference"),
)
