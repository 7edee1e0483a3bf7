# SPDX-License-Identifier: Apache-2.0
"""Sharding over eight devices, which are eight threads of this CPU: tests/jax_devices, in processes of their own."""

from __future__ import annotations

import pytest

from normkit.cpu import library

from .process import pytest_in_a_process

pytest.importorskip("jax")


def test_the_reference_on_eight_devices() -> None:
    pytest_in_a_process("tests/jax_devices", devices=8)


def test_the_cpu_kernels_on_eight_devices() -> None:
    if isinstance(library.load(), library.Missing):
        pytest.skip("the CPU kernels are not compiled")
    pytest_in_a_process("tests/jax_devices", devices=8, implementation="cpu")


def test_the_triton_kernels_on_eight_devices() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    pytest_in_a_process("tests/jax_devices", devices=8, interpret=True)
