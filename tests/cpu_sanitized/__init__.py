# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels compiled with sanitizers; tests/test_cpu_sanitizers.py compiles and runs what is here."""
