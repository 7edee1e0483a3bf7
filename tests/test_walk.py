# SPDX-License-Identifier: Apache-2.0
"""The walk in docs/design.md is what happens: the functions it names are called, in its order; so is its map of the files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")


def steps() -> list[list[str]]:
    """Return for each step the functions it names, as "file function"."""
    text = DESIGN[DESIGN.index("## The walk") : DESIGN.index("## Decisions")]
    found = re.findall(r"^\d+\. (.*?)(?=^\d+\. |^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    return [[" ".join(pair) for pair in re.findall(r"`(\S+\.py)`\s+`([\w.]+)`", step)] for step in found]


def test_the_walk_has_at_most_ten_steps_that_name_what_is_called() -> None:
    assert 5 <= len(steps()) <= 10
    assert all(steps())


def test_the_walk_is_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU tensor is passed off as one on a GPU, and a kernel counts as called when it is launched."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from normkit_torch import FastRMSNorm, device

    from .fake_driver import FakeLaunch, fake_driver

    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            called.append(f"{path.relative_to(ROOT).as_posix()} {frame.f_code.co_qualname}")

    class Launches(list[FakeLaunch]):
        def append(self, launch: FakeLaunch) -> None:
            forward = launch.kernel.startswith("forward")
            called.append(f"normkit/kernels/{'forward' if forward else 'backward'}.py {launch.kernel}")
            called.extend(["normkit/kernels/rows.py weighted"] if forward else [])

    def platform_of(_: Any) -> tuple[str, str]:
        called.append("normkit_torch/device.py platform_of")
        return "cuda", "sm_90"

    norm = FastRMSNorm(torch.ones(256, dtype=torch.bfloat16))
    x, residual = torch.ones(2, 4, 256, dtype=torch.bfloat16).requires_grad_().unbind()
    before = sys.getprofile()
    with fake_driver() as driver:
        driver.launches = Launches()
        monkeypatch.setattr(device, "platform_of", platform_of)
        sys.setprofile(note)
        try:
            normed, stream = norm(x, residual)
            torch.autograd.backward([normed, stream], [torch.ones_like(normed), torch.ones_like(stream)])
        finally:
            sys.setprofile(before)
            monkeypatch.undo()

    position = 0
    for name in (name for step in steps() for name in step):
        assert name in called[position:], f"{name} is not called after {called[max(0, position - 1)]}"
        position = called.index(name, position) + 1


def test_the_map_names_every_file() -> None:
    files = {path.relative_to(ROOT / "normkit").as_posix() for path in (ROOT / "normkit").rglob("*.py")}
    table = DESIGN[DESIGN.index("| file of `normkit`") : DESIGN.index("## The walk")]
    named = set(re.findall(r"`([\w/]+\.py)`", table.split("\n\n")[0]))
    assert named == {name for name in files if not name.endswith("__init__.py")}
    for package in ("normkit_torch", "normkit_jax"):
        for path in (ROOT / package).glob("*.py"):
            assert path.name == "__init__.py" or path.name in DESIGN, path
