# SPDX-License-Identifier: Apache-2.0
"""What all tests share: what ran on which implementation, what was refused and why, and the interpreter where asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter

    interpreter.install()
    if find_spec("jax"):
        from . import jax_interpreter

        jax_interpreter.install()

if "NORMKIT_TEST_KERNELS" in os.environ:
    from normkit.cpu import library

    pytest.MonkeyPatch().setattr(library, "LIBRARY", Path(os.environ["NORMKIT_TEST_KERNELS"]))

_ran: Counter[tuple[str, str, str]] = Counter()
_refused: Counter[tuple[str, str, str]] = Counter()
_elsewhere: dict[str, str] = {}


class Ledger:
    """Counts the calls that each implementation computed or refused; printed at the end of the run."""

    def ran(self, framework: str, implementation: str, what: str) -> None:
        _ran[framework, implementation, what] += 1

    def refused(self, framework: str, implementation: str, reason: str) -> None:
        _refused[framework, implementation, reason] += 1

    def elsewhere(self, process: str, summary: str) -> None:
        """Tests that ran in a process of their own, and the summary that it printed."""
        _elsewhere[process] = summary


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def driver(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A `FakeDriver`, which Triton launches on meanwhile; what is compiled is kept for the other tests."""
    from .fake_driver import fake_driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "launch_cache"))
    with fake_driver() as fake:
        yield fake


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the implementations that the registry chose during the test, in order; no call is one prepared before."""
    from normkit import registry

    if find_spec("torch"):
        from normkit_torch import prepared

        monkeypatch.setattr(prepared, "keep", lambda *_: None)
        monkeypatch.setattr(prepared, "_calls", {})

    names: list[str] = []
    original = registry.select

    def select(*arguments: Any, **options: Any) -> Any:
        chosen = original(*arguments, **options)
        names.append(chosen.name)
        return chosen

    monkeypatch.setattr(registry, "select", select)
    return names


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ran or _refused:
        terminalreporter.section("implementations")
    for (framework, implementation, what), count in sorted(_ran.items()):
        terminalreporter.write_line(f"ran      {framework:6} {implementation:10} {what:9} {count}")
    for (framework, implementation, reason), count in sorted(_refused.items()):
        terminalreporter.write_line(f"refused  {framework:6} {implementation:10} {count} x {reason}")
    for process, summary in _elsewhere.items():
        terminalreporter.section(process)
        terminalreporter.write_line(summary)
