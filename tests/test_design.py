# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/design.md: import arrows, sizes, names, documentation, and the walk."""

from __future__ import annotations

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normkit.registry import Implementation
from normkit.spec import NormSpec, Operand, Problem, describe
from normkit.vendors import guards

ROOT = Path(__file__).parent.parent
PACKAGES = ("normkit", "normkit_torch", "normkit_jax")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
PYTHON = [*SOURCES, *(path for folder in ("tests", "examples", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))]
FILE_LINES, FUNCTION_LINES = 300, 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """Name a file as it is written in the documentation."""
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def tables() -> dict[str, tuple[Implementation, ...]]:
    """The table of each front end whose framework is installed, by framework."""
    found = {}
    for framework, package in (("NumPy", "normkit"), ("PyTorch", "normkit_torch"), ("JAX", "normkit_jax")):
        # the tables import no framework, but their packages do
        try:
            found[framework] = tuple(importlib.import_module(f"{package}.implementations").TABLE)
        except ImportError:
            continue
    return found


def entries() -> list[Implementation]:
    """Every implementation of every table once."""
    return list(dict.fromkeys(entry for table in tables().values() for entry in table))


# Imports


@pytest.mark.parametrize(
    ("imported", "unwanted"),
    [
        ("normkit", "torch jax triton safetensors transformers normkit_torch normkit_jax"),
        ("normkit.__main__", "torch jax triton safetensors transformers normkit_torch normkit_jax"),
        ("normkit.plan, normkit.reference, normkit.tolerance, normkit.compile", "torch jax triton normkit_torch normkit_jax"),
        ("normkit.kernels", "torch jax normkit_torch normkit_jax"),
        ("normkit_torch, normkit_torch.lorax, normkit_torch.launch", "jax triton normkit_jax safetensors transformers"),
        ("normkit_jax", "torch triton normkit_torch safetensors transformers"),
    ],
)
def test_an_import_loads_no_more_than_it_should(imported: str, unwanted: str) -> None:
    for framework in ("torch", "jax"):
        if f"normkit_{framework}" in imported:
            pytest.importorskip(framework)
    if "kernels" in imported:
        pytest.importorskip("triton")
    code = f"import sys\nimport {imported}\nprint(*sorted(set({unwanted.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the three packages that a file imports anywhere in it."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def reachable(module: str) -> set[str]:
    """Return the modules of the three packages that a module imports, and those that these import."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    seen: set[str] = set()
    todo = [module]
    while todo:
        for found in imports(files[todo.pop()]):
            if found in files and found not in seen:
                seen.add(found)
                todo.append(found)
    return seen


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.module)
def test_implementations_never_import_one_another(entry: Implementation) -> None:
    assert reachable(entry.module) & {other.module for other in entries()} - {entry.module} == set()


def test_the_search_for_imports_finds_them() -> None:
    assert {"normkit.spec", "normkit.arrays"} <= reachable("normkit.reference")
    assert "normkit.kernels.forward" not in reachable("normkit.plan")


# Sizes and texts


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, Function):
            documented = ast.get_docstring(node) is not None
            first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno + 1 <= FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_licence_line_and_no_notes_to_self(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n") or not text
    assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b", text)


# "scale" and "offset" alone are not here: a test's data has a scale, and memory has offsets.
FORBIDDEN = re.compile(r"\b(back" + r"end|provider|prenorm|pre_norm|epsilon)s?\b", re.IGNORECASE)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_one_word_for_one_thing(path: Path) -> None:
    """Names that the code gives, and words that its comments and docstrings use; what others are called is not in question."""
    tree = parsed(path)
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef)}
    # the attribute that Hugging Face's and LoRAX's norms have
    words = {word for name in names - {"variance_epsilon"} for word in name.split("_")}
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    prose = " ".join(token.string for token in tokens if token.type == tokenize.COMMENT)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose += " ".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
    assert FORBIDDEN.findall(" ".join((*words, prose))) == []


def test_forbidden_words_are_found() -> None:
    assert FORBIDDEN.findall("The back" + "ends of a Provider, variance_epsilon") == ["back" + "end", "Provider"]


# Documentation and types of public names


def public_definitions(tree: ast.Module) -> Iterator[ast.ClassDef | Function]:
    """Yield the public classes and functions of a module, and the public methods of these classes."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, Function) and not item.name.startswith("_")]
                # a setter has the docstring of its property
                yield from (item for item in methods if not any(isinstance(on, ast.Attribute) for on in item.decorator_list))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented_and_typed(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree)
    for node in public_definitions(tree):
        assert ast.get_docstring(node), node.name
        if isinstance(node, Function) and "kernels" not in path.parts:
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
            untyped = [item.arg for item in every if item and item.annotation is None and item.arg not in ("self", "cls")]
            assert untyped == [] and node.returns is not None, node.name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_has_an_example(package: str) -> None:
    if package != "normkit":
        pytest.importorskip(package.removeprefix("normkit_"))
    module = importlib.import_module(package)
    assert list(module.__all__) == sorted(module.__all__)
    without = {"Verdict", "Weights"}
    for name in module.__all__:
        item = getattr(module, name)
        is_error = isinstance(item, type) and issubclass(item, Exception)
        if callable(item) and not is_error and name not in without and not name.startswith("unpatch"):
            assert ">>>" in item.__doc__, name


# Tables


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.module)
def test_an_implementation_is_a_module_with_these_functions(entry: Implementation) -> None:
    kernels: Any = entry.load()
    assert all(callable(getattr(kernels, name)) for name in ("supports", "forward"))
    if not hasattr(kernels, "backward"):
        rejected = kernels.supports(describe(NormSpec("rms"), Operand((4, 256), "float32"), needs_grad=True))
        assert rejected and "no backward pass" in rejected.reason


def test_reference_is_the_last_choice_everywhere() -> None:
    for table in tables().values():
        assert (table[-1].name, table[-1].automatic) == ("reference", None)


def rows_of_table(text: str, first: str) -> list[list[str]]:
    """Return the cells of the Markdown table whose head starts with this cell."""
    head, _, *lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]


def supported(entry: Implementation, problem: Problem) -> bool:
    """Whether an implementation computes a problem; a vendor's one: where its package is installed."""
    kernels: Any = entry.load()
    if ".vendors." in entry.module:
        return not guards.refusal(problem, entry.name) and not kernels._refusal(problem)
    return kernels.supports(problem) is None


def test_the_support_table_of_the_readme_is_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if "JAX" in tables():
        # the table is for the newest versions
        monkeypatch.setattr("jax.__version_info__", (0, 11, 2))
    head, *rows = rows_of_table((ROOT / "README.md").read_text(encoding="utf-8"), "platform")
    assert [row[0] for row in rows] == ["cuda", "rocm", "xpu", "cpu", "any other"]
    for platform, *cells in rows:
        for framework, cell in zip(head[1:], cells, strict=True):
            if framework not in tables() or (framework == "NumPy" and platform != "cpu"):
                continue
            operands = [Operand((4, 256), "float32")] * 2 + [Operand((256,), "float32")]
            problem = describe(NormSpec("rms"), *operands, platform="tpu" if platform == "any other" else platform)
            expected = [
                entry.name
                for entry in tables()[framework]
                if supported(entry, problem) and (entry.automatic is None or problem.platform in entry.automatic)
            ]
            assert cell.split(", ") == expected, (platform, framework)


def test_the_rounding_table_is_what_the_implementations_do() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    text = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    head, *rows = rows_of_table(text, "implementation")
    assert {row[0].strip("`") for row in rows} == {entry.name for entry in entries()}
    for row in rows:
        entry = next(entry for entry in entries() if entry.name == row[0].strip("`"))
        if ".vendors." in entry.module:
            continue  # what these do is found by computing, and tested with the real packages
        platform = (entry.automatic or ("cpu",))[0]
        for policy, cell in list(zip(head, row, strict=True))[1:-1]:
            spec = NormSpec("rms", rounding=policy.strip('`"'))
            rejected = entry.load().supports(describe(spec, Operand((4, 256), "float32"), platform=platform))
            assert (rejected is None) == (cell == "yes"), (entry.name, policy)
