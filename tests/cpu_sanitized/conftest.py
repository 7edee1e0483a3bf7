# SPDX-License-Identifier: Apache-2.0
"""These tests need kernels compiled with sanitizers: tests/test_cpu_sanitizers.py runs them in a process of its own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "NORMKIT_TEST_KERNELS" in os.environ else ["test_*.py"]
