# SPDX-License-Identifier: Apache-2.0
"""These tests watch the kernels run in the Triton interpreter, which is on or off for a whole process."""

from __future__ import annotations

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not INTERPRETS:
        terminalreporter.write_line("tests/triton_interpreter needs TRITON_INTERPRET=1: tests/test_processes.py runs it")
