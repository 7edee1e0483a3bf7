# SPDX-License-Identifier: Apache-2.0
"""The Triton interpreter as a test device: CPU tensors run the kernels as they are, on a platform that says it is cuda."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def install() -> None:
    """Say that CPU tensors are on cuda, at the one place that detects it, and let the interpreter round as hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter

    from normkit_torch import device

    vars(device)["platform_of"] = lambda _: ("cuda", "sm_90")
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        # the interpreter truncates here, hardware rounds to nearest even
        if source == tl.float32 and target == tl.bfloat16:
            rounded = np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)
            return rounded.view(np.uint16).reshape(values.shape)
        return original(values, source, target, mode)

    interpreter._convert_float = convert
