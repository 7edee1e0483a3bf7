# SPDX-License-Identifier: Apache-2.0
"""The vendor whose package is installed in this environment: at most one, as each wants a torch of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from normkit.vendors import rounding
from normkit_torch import prepared

PACKAGES = {"vllm": "vllm", "ipex": "intel_extension_for_pytorch"}
NAME = next((name for name, package in PACKAGES.items() if find_spec(package)), "")
if not NAME:
    pytest.skip("no vendor's package is installed; tests/test_vendors.py runs this where one is", allow_module_level=True)
MODULE: Any = import_module(f"normkit.vendors.{NAME}")
# What torch calls the operator that adds and normalises.
OPERATOR = {"vllm": "_C::fused_add_rms_norm", "ipex": "torch_ipex::add_rmsnorm"}[NAME]
PLATFORM = {"vllm": "rocm", "ipex": "xpu"}[NAME]


def rows(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """Collect what the vendor's operators are given, and where they write."""
    calls: list[Any] = []
    compute = MODULE.compute

    def recording(spec: Any, given: Any, out: Any) -> Any:
        results = compute(spec, given, out)
        if len(given.x) != rounding._ROWS:  # not those rows that are computed to see how they are rounded
            calls.append((given, results))
        return results

    prepared.forget()
    with patch.object(MODULE, "compute", recording):
        yield calls
    prepared.forget()
