# SPDX-License-Identifier: Apache-2.0
"""Random calls of the CPU kernels through NumPy arrays that lie anyhow in memory, judged by the bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from normkit.arrays import numpy_dtype
from normkit.cpu import library
from normkit.cpu import numpy as cpu
from normkit.interface import Forward, Wanted
from normkit.spec import Problem
from normkit.tolerance import expected_backward, expected_forward, worst

from .cases import Case, NumpyArray
from .cpu_operands import DTYPES, LOADED

LEVELS = LOADED.levels if isinstance(LOADED, library.Library) else (library.FASTEST,)
MOST_ELEMENTS, MOST_ROWS, MOST_BETWEEN = 20_000, 2100, 32
"""Of random arrays: elements, rows, and elements between rows."""


class Layout(NamedTuple):
    """How an array lies in memory.

    Attributes:
        offset: bytes before it.
        gap: elements between rows.
        step: from one element of a row to the next.
        transposed: whether the last of the leading axes is the outermost in memory.
        backwards: whether the first axis is.
        repeated: whether the first axis has stride 0.
    """

    offset: int = 0
    gap: int = 0
    step: int = 1
    transposed: bool = False
    backwards: bool = False
    repeated: bool = False


_NO_OR_YES, _NO = (False, True), (False,)
LAYOUTS = (
    *(Layout(),) * 60,
    *itertools.starmap(
        Layout, itertools.product((0, 1, 2, 4, 31), (0, 1, 9, MOST_BETWEEN), (1,), _NO_OR_YES, _NO_OR_YES, _NO_OR_YES)
    ),
    *itertools.starmap(Layout, itertools.product((0, 3), (0, 5), (-1, 2), _NO_OR_YES, _NO, _NO)),
)


@dataclass(frozen=True)
class Call:
    """What is computed, how each array lies in memory, and what computes it. `wanted`: dx, dresidual, dweight and dbias."""

    case: Case
    layouts: dict[str, Layout]
    seed: int
    level: int
    threads: int
    wanted: Sequence[bool]
    in_place: bool


_LEADING = (
    (1,),
    (2,),
    (3,),
    (5,),
    (17,),
    (2, 3),
    (3, 2),
    (2, 1, 3),
    (3, 2, 2),
    (4, 5),
    (),
    (0,),
    (3, 0),
    (40,),
    (300,),
    (MOST_ROWS,),
)
_HIDDEN = (
    *range(1, 70),
    *(95, 96, 97, 100, 127, 128, 129, 160, 255, 256, 257, 300, 384, 511, 512, 513, 600, 768, 1000),
    *(1023, 1024, 1025, 1536, 2047, 2048, 2049, 3000),
)
_MAYBE, _OTHER = (*DTYPES, None, None), (None, *DTYPES)
ROW_ARRAYS = ("x", "residual", "dy", "dresidual_out")
_OPTIONS = {
    "kind": ("rms", "layer"),
    "eps": (1e-5, 1e-6, 1e-12, 1.0),
    "weight_offset": (0.0, 0.0, 1.0, -0.5),
    "rounding": (None, "sum", "stored", "hf"),
    "mean": (0.0, 0.0, 3.0, 50.0),
    "scale": (1.0, 1.0, 1e-2, 10.0),
}


def _one_of_each(*choices: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Draw from each of these; in one draw, as draws take most of the time."""
    return st.sampled_from(tuple(itertools.product(*choices)))


_SHAPES = _one_of_each(_LEADING, _HIDDEN)
# of x, residual, weight, bias, residual_out and y: mixed, or one
_MIXED = _one_of_each(DTYPES, _MAYBE, _MAYBE, _MAYBE, _OTHER, _OTHER)
_SAME = _one_of_each(DTYPES, (True, False), (True, False), (True, False), (None,), (None,))
_SETTINGS = _one_of_each(LEVELS, (1, 2), *((True, False),) * 4, (False, False, True), (False, True))
_CHOICES, _LAYOUT, _SEED = _one_of_each(*_OPTIONS.values()), st.sampled_from(LAYOUTS), st.integers(0, 2**16)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any call that the CPU kernels take, half of them with one dtype."""
    (leading, hidden), chosen = draw(_SHAPES), dict(zip(_OPTIONS, draw(_CHOICES), strict=True))
    level, threads, *wanted, in_place, mixed = draw(_SETTINGS)
    x, *others, residual_dtype, out_dtype = draw(_MIXED if mixed else _SAME)
    residual, weight, bias = others if mixed else (x if there else None for there in others)
    in_place = in_place and residual is not None
    case = Case(
        "random",
        shape=(*leading, min(hidden, MOST_ELEMENTS // max(1, math.prod(leading)))),
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        residual_dtype=None if in_place else residual_dtype,
        out_dtype=None if in_place else out_dtype,
        **(chosen if weight else chosen | {"weight_offset": 0.0}),
    )
    layouts = {name: draw(_LAYOUT) for name in (*ROW_ARRAYS, "weight", "bias")}
    if in_place:
        layouts = {name: layout._replace(repeated=False) for name, layout in layouts.items()}
    return Call(case, layouts, draw(_SEED), level, threads, wanted, in_place)


@cache
def _numbers(dtype: str, mean: float, scale: float) -> NumpyArray:
    """Random numbers to take arrays from: to draw them anew would take longer than to compute with them."""
    return (mean + scale * np.random.default_rng(0).standard_normal(3 * MOST_ELEMENTS + MOST_ROWS * MOST_BETWEEN)).astype(
        numpy_dtype(dtype)
    )


def placed(shape: tuple[int, ...], dtype: str, layout: Layout, numbers: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """Return an array that lies in memory as asked, and that memory, which ends with the array's last element."""
    size = numpy_dtype(dtype).itemsize
    extents = list(shape[:-1])
    if layout.repeated and extents:
        extents[0] = 1
    strides, row = [0] * len(extents), (shape[-1] - 1) * abs(layout.step) + 1
    distance = row + layout.gap
    for axis in range(len(extents)) if layout.transposed else reversed(range(len(extents))):
        strides[axis], distance = distance, distance * extents[axis]
    last = sum(stride * (extent - 1) for stride, extent in zip(strides, extents, strict=True))
    count = 0 if 0 in shape else last + row
    memory = np.empty(layout.offset + count * size, np.uint8)
    flat = memory[layout.offset :].view(numpy_dtype(dtype))
    flat[...] = numbers[:count]
    steps = [step * size for step in (*strides, abs(layout.step))]
    array = np.lib.stride_tricks.as_strided(flat, (*extents, shape[-1]), steps)
    if layout.step < 0:
        array = array[..., ::-1]
    if layout.backwards and extents:
        array = array[::-1]
    return (np.broadcast_to(array, shape) if layout.repeated else array), memory


def arrays_of(call: Call) -> tuple[dict[str, NumpyArray | None], dict[str, NumpyArray]]:
    """Return the arrays of a call, and the memory that they lie in."""
    case, problem = call.case, call.case.problem()
    hidden = case.shape[-1:]
    facts = {
        "x": (case.shape, case.x, case.mean, case.scale),
        "residual": (case.shape, case.residual, case.mean, case.scale),
        "weight": (hidden, case.weight, 1.0, 0.3),
        "bias": (hidden, case.bias, 0.0, 0.5),
        "dy": (case.shape, problem.out_dtype, 0.0, 1.0),
        "dresidual_out": (case.shape, problem.residual_out_dtype, 0.0, 1.0),
    }
    arrays: dict[str, NumpyArray | None] = dict.fromkeys(facts)
    memory = {}
    for number, (name, (shape, dtype, mean, scale)) in enumerate(facts.items()):
        if dtype is not None:
            numbers = _numbers(dtype, mean, scale)[(call.seed + number * 7919) % MOST_ELEMENTS :]
            arrays[name], memory[name] = placed(shape, dtype, call.layouts[name], numbers)
    return arrays, memory


class Setting:
    """What computes the calls: the level of instructions and the most threads."""

    level, threads = library.FASTEST, 1


@contextmanager
def set_up() -> Iterator[Setting]:
    """Let the kernels be called with what a Setting has."""
    setting = Setting()
    forward: Callable[..., None] = library.forward
    backward: Callable[..., None] = library.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "forward", lambda *arguments: forward(*arguments, level=setting.level))
        patch.setattr(library, "backward", lambda *arguments: backward(*arguments, level=setting.level))
        patch.setattr(cpu, "threads", lambda: setting.threads)
        yield setting


def check(call: Call, setting: Setting) -> None:
    """Compute a call, forward and, where gradients are wanted, backward, and judge every result."""
    setting.level, setting.threads = call.level, call.threads
    arrays, memory = arrays_of(call)
    before = {name: array.copy() for name, array in memory.items()}
    x, *others = given = (arrays["x"], arrays["residual"], arrays["weight"], arrays["bias"])
    assert x is not None
    if call.in_place:
        check_in_place(call, arrays, memory, before)
        return
    wants = any(call.wanted)
    problem = call.case.problem(needs_grad=wants)
    forward = cpu.forward(problem, x, *others)
    judge_forward(problem, given, forward)
    if wants:
        h = x if forward.residual_out is None else forward.residual_out
        judge_backward(call, problem, arrays, h, forward)
    for name, array in memory.items():
        assert np.array_equal(array, before[name]), f"{name} was changed"


def judge_forward(problem: Problem, given: tuple[NumpyArray | None, ...], found: Forward) -> None:
    """Compare y and residual_out with the exact ones."""
    x, *others = given
    assert x is not None
    y, residual_out = expected_forward(problem, x, *others, residual_out=found.residual_out)
    assert (found.y.dtype.name, found.y.shape) == (problem.out_dtype, problem.shape)
    assert worst(found.y, y) <= 1, "y"
    if problem.spec.rounding == "hf" and not (problem.weight_dtype or problem.bias_dtype):
        rounded = found.y.astype(numpy_dtype(problem.x_dtype)).astype(found.y.dtype)
        assert np.array_equal(found.y, rounded, equal_nan=True), "y is x_hat, which was not rounded"
    if problem.residual_out_dtype:
        assert found.residual_out is not None
        assert found.residual_out.dtype.name == problem.residual_out_dtype
        assert worst(found.residual_out, residual_out) <= 1, "residual_out"


def judge_backward(call: Call, problem: Problem, arrays: dict[str, NumpyArray | None], h: NumpyArray, forward: Forward) -> None:
    """Compute the gradients that are wanted, and compare them with the exact ones."""
    wanted = Wanted.by(problem, *call.wanted)
    dy, dresidual_out, weight = arrays["dy"], arrays["dresidual_out"], arrays["weight"]
    assert dy is not None
    found = cpu.backward(problem, wanted, dy, dresidual_out, h, weight, forward.mean, forward.rstd)
    expected = expected_backward(problem, dy, dresidual_out, h, weight)
    for name, gradient, asked in zip(wanted._fields, found, wanted, strict=True):
        assert (gradient is not None) == asked, name
        if gradient is not None:
            assert worst(gradient, expected[name]) <= 1, name


def check_in_place(
    call: Call, arrays: dict[str, NumpyArray | None], memory: dict[str, NumpyArray], before: dict[str, NumpyArray]
) -> None:
    """Compute y into x and residual_out into the residual: judged, and nothing around them written."""
    x, residual, weight, bias = (arrays[name] for name in ("x", "residual", "weight", "bias"))
    assert x is not None
    assert residual is not None
    given = (x.copy(), residual.copy(), weight, bias)
    cpu.forward_into(call.case.problem(in_place=True), x, residual, weight, bias, Forward(x, residual, None, None))
    judge_forward(call.case.problem(), given, Forward(x.copy(), residual.copy(), None, None))
    x[...], residual[...] = given[:2]
    for name, array in memory.items():
        assert np.array_equal(array, before[name]), f"what lies around {name} was changed"
