# SPDX-License-Identifier: Apache-2.0
"""The implementations for torch tensors, in the order in which they are tried."""

from normkit.registry import Implementation

TABLE = (
    Implementation("ipex", "normkit.vendors.ipex", automatic=("xpu",)),
    Implementation("vllm", "normkit.vendors.vllm", automatic=("rocm", "xpu")),
    Implementation("triton", "normkit_torch.launch", automatic=("cuda", "rocm", "xpu")),
    Implementation("cpu", "normkit_torch.cpu", automatic=("cpu",)),
    Implementation("reference", "normkit.reference"),
)
