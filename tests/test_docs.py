# SPDX-License-Identifier: Apache-2.0
"""Everything shown runs: the Python blocks of the README and of docs/, in order, and the examples of all docstrings.

A block with a title is a file: it is written, in a copy of the packages, in place of what may be there. The other blocks of a
page are one program. What it prints must be what their comments say: `print(...)  # this`, or a line `# this` of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from normkit.implementations import TABLE

ROOT = Path(__file__).parent.parent
PACKAGES = ("normkit", "normkit_torch", "normkit_jax")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NEEDS = {"normkit": ("safetensors",), "normkit_torch": ("torch",), "normkit_jax": ("jax",)}

DOCTESTS = """
import doctest, importlib, pkgutil, sys
import normkit
from pathlib import Path
package = importlib.import_module(sys.argv[1])
names = [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."))]
failed = attempted = 0
for name in names:
    if not name.startswith(("normkit.kernels", "normkit.examples")) and not name.endswith("__main__"):
        try:
            module = importlib.import_module(name)
        except normkit.MissingPackageError as error:
            print("skipped:", error)
            continue
        result = doctest.testmod(module)
        failed, attempted = failed + result.failed, attempted + result.attempted
print("ran", attempted)
sys.exit(failed > 0)
"""


class Block(NamedTuple):
    """A block of Python on a page; `line` is the page's line that its first line is on."""

    title: str | None
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    """Return the Python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r'^```python(?: title="([^"]+)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def expected_output(code: str) -> list[str]:
    """Return what the comments of a block say that it prints."""
    return [match[1] for match in re.finditer(r"^(?:print\(.*\)  )?# (.+)$", code, re.MULTILINE)]


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program on the packages in a folder; warnings are errors."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def copy_of_packages(folder: Path) -> Path:
    """Copy the packages and the tests to a folder."""
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def need(code: str) -> None:
    """Skip the test where a package that the code imports is not installed."""
    for package in ("torch", "jax", "flax", "equinox", "triton"):
        if re.search(rf"^(?:import|from) (?:normkit_)?{package}\b|{package}_kernel_call", code, re.MULTILINE):
            pytest.importorskip(package)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_of_a_page_run_and_print_what_they_say(page: Path, tmp_path: Path) -> None:
    folder = copy_of_packages(tmp_path)
    program: list[str] = []
    output: list[str] = []
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")
            continue
        # as many lines as on the page, so that a traceback names the page's line
        program += [""] * (block.line - 1 - len(program)) + block.code.splitlines()
        output += expected_output(block.code)
    code = "\n".join(program)
    need(code)
    done = run(f"exec(compile({code!r}, {page.name!r}, 'exec'), {{'__name__': 'page'}})", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == output


def test_which_pages_have_code() -> None:
    """So that none of them can lose it to a change of the pattern above."""
    counts = {page.name: len(blocks(page)) for page in PAGES if blocks(page)}
    assert counts == {"README.md": 7, "add-an-implementation.md": 4, "jax.md": 6, "numerics.md": 2, "torch.md": 2}
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert everything.count("```python") == sum(counts.values())


def test_the_readme_has_the_set_up_commands_and_the_constraints_pin_all_they_install() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (pip install .*)$", readme, re.MULTILINE)
    assert commands == [
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        'pip install -e ".[torch]"',
        'pip install -c constraints.txt -e ".[demo]" && normkit demo',
        'pip install -c constraints.txt -e ".[dev]" && pytest',
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    names = {re.match(r"[\w-]+", each)[0] for each in asked}  # type: ignore[index]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert names - {"normkit"} <= set(pinned)


def test_wrong_output_is_seen() -> None:
    code = 'print("right")  # right\nfor i in range(2):\n    print(i)  # not at the margin\n# 0\n# 1\n'
    assert expected_output(code) == ["right", "0", "1"]


def test_a_new_implementation_is_one_file_and_one_line() -> None:
    titled = {block.title: block.code for block in blocks(ROOT / "docs/add-an-implementation.md") if block.title}
    new, table = titled
    assert not (ROOT / str(new)).exists()
    shown: dict[str, Any] = {"__package__": "normkit"}
    exec(titled[table], shown)
    assert [entry for entry in shown["TABLE"] if entry in TABLE] == list(TABLE)
    assert len(shown["TABLE"]) == len(TABLE) + 1


def test_the_tests_follow_a_new_implementation(tmp_path: Path) -> None:
    folder = copy_of_packages(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for block in blocks(ROOT / "docs/add-an-implementation.md"):
        if block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_functional.py", "-k", "numpy-einsum"]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 50
    assert re.search(r"^ran +numpy +einsum", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("package", "at_least"), [("normkit", 45), ("normkit_torch", 30), ("normkit_jax", 20)])
def test_docstring_examples_run(package: str, at_least: int) -> None:
    for module in NEEDS[package]:
        pytest.importorskip(module)
    done = run(DOCTESTS, ROOT, package)
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.search(r"^ran (\d+)$", done.stdout, re.MULTILINE)
    assert count and int(count[1]) >= at_least
