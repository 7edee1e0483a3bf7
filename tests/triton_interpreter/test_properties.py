# SPDX-License-Identifier: Apache-2.0
"""Any shape, strides, dtypes and options: the kernels are within the derived bounds, and stay within their memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normkit.tolerance import expected_backward, expected_forward, worst

from ..cases import Case
from ..frameworks import Torch
from ..interpreter import watch

TORCH = Torch()
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
OPTIONAL_DTYPES = st.none() | DTYPES


@dataclass(frozen=True)
class View:
    """How to lay out an array: the order of its leading dimensions in memory, the step between rows' elements, padding."""

    order: int
    step: int
    padding: int
    expanded: bool

    def of(self, values: Tensor) -> Tensor:
        """Return a tensor of these values (of the first of them, where expanded) that lies in memory so."""
        rank = values.ndim - 1
        shape = [*values.shape[:-1], values.shape[-1] * self.step + self.padding]
        order = [(position + self.order) % rank for position in range(rank)] + [rank]
        memory = torch.zeros([shape[position] for position in order], dtype=values.dtype)
        view = memory.permute(*(order.index(position) for position in range(rank + 1)))
        view = view[..., : values.shape[-1] * self.step : self.step]
        view.copy_(values)
        return view[:1].expand(view.shape) if self.expanded and rank else view


VIEWS = st.builds(View, st.integers(0, 2), st.sampled_from([1, 1, 1, 2]), st.sampled_from([0, 0, 1, 8]), st.booleans())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return any case that is small, and can be asked for."""
    leading = draw(st.lists(st.integers(0, 3), max_size=3))
    kind = draw(st.sampled_from(["rms", "layer"]))
    # the deviation of very few values may be far below the rounding of the residual, and first-order bounds say nothing then
    hidden_size = draw(st.integers(1 if kind == "rms" else 8, 70) | st.sampled_from([128, 1000, 2049]))
    weight, residual = draw(OPTIONAL_DTYPES), draw(OPTIONAL_DTYPES)
    return Case(
        name=f"drawn_{draw(st.integers(0, 99))}",
        kind=kind,
        shape=(*leading, hidden_size),
        x=draw(DTYPES),
        residual=residual,
        weight=weight,
        bias=draw(OPTIONAL_DTYPES),
        eps=draw(st.sampled_from([1e-6, 1e-3])),
        weight_offset=draw(st.sampled_from([0.0, 1.0])) if weight else 0.0,
        rounding=draw(st.sampled_from([None, "sum", "stored", "hf"])),
        residual_dtype=draw(OPTIONAL_DTYPES),
        out_dtype=draw(OPTIONAL_DTYPES),
    )


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(cases(), st.tuples(VIEWS, VIEWS, VIEWS, VIEWS))
def test_any_problem(case: Case, views: tuple[View, View, View, View]) -> None:
    arrays: dict[str, Any] = {name: TORCH.array(array) for name, array in case.arrays().items()}
    for name, view in zip(("x", "residual", "dy", "dresidual_out"), views, strict=True):
        if arrays[name] is not None:
            arrays[name] = view.of(arrays[name])
    given_arrays = {name: TORCH.numpy(array) for name, array in arrays.items()}
    with watch() as launches:
        y, residual_out = TORCH.call(case, arrays, "triton")
        h, gradients = _gradients(case, arrays)
    for launch in launches:
        written = [name for name in launch.tensors if launch.writes(name).any()]
        assert all((launch.writes(name) == 1).all() for name in written)
    problem = case.problem()
    operands = {name: given_arrays[name] for name in ("x", "residual", "weight", "bias")}
    computed = TORCH.numpy(residual_out) if problem.residual_out_dtype else None
    expected_y, expected_residual_out = expected_forward(problem, **operands, residual_out=computed)
    assert worst(TORCH.numpy(y), expected_y) <= 1
    assert computed is None or worst(computed, expected_residual_out) <= 1
    dy, dresidual_out, weight = (given_arrays[name] for name in ("dy", "dresidual_out", "weight"))
    expected = expected_backward(problem, dy, dresidual_out, h, weight)
    for name, gradient in gradients.items():
        assert worst(TORCH.numpy(gradient), expected[f"d{name}"]) <= 1, name
    for name, array in given_arrays.items():
        after = TORCH.numpy(arrays[name])
        assert array is None or (after is not None and np.array_equal(array, after)), name


def _gradients(case: Case, arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return h and the gradients, of leaves that keep their strides."""
    names = [name for name in ("x", "residual", "weight", "bias") if arrays[name] is not None]
    leaves = arrays | {name: arrays[name].detach().requires_grad_() for name in names}
    y, residual_out = TORCH.call(case, leaves, "triton")
    computed = arrays["dresidual_out"] is not None
    outputs, cotangents = ([y, residual_out], [arrays["dy"], arrays["dresidual_out"]]) if computed else ([y], [arrays["dy"]])
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], cotangents)
    return TORCH.numpy(residual_out if computed else arrays["x"]), dict(zip(names, gradients, strict=True))
