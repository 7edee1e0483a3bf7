# SPDX-License-Identifier: Apache-2.0
"""These tests need eight devices, whose number is set once for a whole process: tests/test_jax_devices.py runs them.

`pytest_in_a_process` says for which implementation.
"""

from __future__ import annotations

import os

IMPLEMENTATION = (
    "triton" if os.environ.get("TRITON_INTERPRET") == "1" else os.environ.get("NORMKIT_TEST_IMPLEMENTATION", "reference")
)
EIGHT = "--xla_force_host_platform_device_count=8"
collect_ignore_glob = [] if EIGHT in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]
