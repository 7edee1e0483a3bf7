# SPDX-License-Identifier: Apache-2.0
"""`normkit info`: with every framework, with none, with broken ones, and with an implementation that computes wrongly."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import normkit
from normkit import info, reference
from normkit.__main__ import main

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("torch", "jax", "triton")
BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from normkit.__main__ import main
raise SystemExit(main(["info"]))
"""


def in_a_process(*arguments: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python on the sources, with a folder of other modules in front of the installed ones."""
    path = [str(folder) for folder in (first_on_path, ROOT) if folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def installed() -> list[str]:
    """The frameworks that are here."""
    return [name for name in FRAMEWORKS if importlib.util.find_spec(name)]


def line_of(report: str, start: str) -> str:
    """The one line that starts so."""
    (line,) = [line for line in report.splitlines() if line.startswith(start)]
    return line


def test_versions_are_those_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert line_of(out, "normkit") == f"normkit    {normkit.__version__}"
    for name in ("numpy", "ml_dtypes", *FRAMEWORKS):
        version = importlib.metadata.version(name) if name not in FRAMEWORKS or name in installed() else "not installed"
        assert line_of(out, name.ljust(10)).split(maxsplit=1)[1] == version


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_each_front_end_shows_every_implementation_of_its_table(framework: str) -> None:
    pytest.importorskip(framework)
    package = "normkit" if framework == "numpy" else f"normkit_{framework}"
    table = importlib.import_module(f"{package}.implementations").TABLE
    checks = [check for check in info.collect().checks if check.framework == framework]
    assert checks
    for check in checks:
        assert [trial.verdict.name for trial in check.trials] == [implementation.name for implementation in table]
        assert any(trial.verdict.accepted for trial in check.trials)
        for trial in check.trials:
            assert trial.problem is None
            assert (trial.error is not None and trial.error <= 1) == trial.verdict.accepted


@pytest.mark.parametrize("missing", [*((name,) for name in FRAMEWORKS), ("torch", "jax"), FRAMEWORKS], ids=" ".join)
def test_without(missing: tuple[str, ...]) -> None:
    done = in_a_process("-c", BLOCKED.format(blocked=set(missing)))
    assert (done.returncode, done.stderr) == (0, "")
    for name in FRAMEWORKS:
        absent = name in missing or name not in installed()
        assert (line_of(done.stdout, name.ljust(10)).split(maxsplit=1)[1] == "not installed") == absent
        if name != "triton":
            assert (f"\n{name} on " in done.stdout) != absent
    assert re.search(r"\nnumpy on cpu\n(  .*\n)*  (cpu|reference) +runs ", done.stdout)
    assert "BROKEN" not in done.stdout


@pytest.mark.parametrize("broken", FRAMEWORKS)
def test_a_broken_framework_is_reported_with_its_error(broken: str, tmp_path: Path) -> None:
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise OSError('libsomething.so: cannot open\\n  shared object')\n")
    done = in_a_process("-m", "normkit", "info", first_on_path=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    expected = f"{broken:<10} BROKEN: OSError: libsomething.so: cannot open shared object"
    assert line_of(done.stdout, broken.ljust(10)) == expected
    assert re.search(r"\nnumpy on cpu\n(  .*\n)*  (cpu|reference) +runs ", done.stdout)


def test_a_framework_that_lacks_one_of_its_own_modules_is_broken_not_missing(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("import module_that_jax_needs\n")
    done = in_a_process("-m", "normkit", "info", first_on_path=tmp_path)
    assert "No module named 'module_that_jax_needs'" in line_of(done.stdout, "jax ".ljust(10))
    assert done.returncode == 1


def test_a_framework_that_imports_but_cannot_list_devices(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("__version__ = '0'\ndef devices():\n    raise RuntimeError('driver too old')\n")
    done = in_a_process("-m", "normkit", "info", first_on_path=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "\njax on no device\n  BROKEN: RuntimeError: driver too old" in done.stdout


def test_a_wrong_implementation_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward = reference.forward

    def shifted(*arguments: Any) -> Any:
        result = forward(*arguments)
        return result._replace(y=result.y + 1e-3)

    monkeypatch.setattr(reference, "forward", shifted)
    assert main(["info"]) == 1
    assert "WRONG: ArithmeticError: the result is" in capsys.readouterr().out


def test_an_implementation_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reference, "forward", fails)
    assert main(["info"]) == 1
    assert "WRONG: RuntimeError: out of memory" in capsys.readouterr().out


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"normkit {normkit.__version__}\n")
    assert "info" in out and "demo" in out
