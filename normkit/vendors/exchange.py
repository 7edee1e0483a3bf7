# SPDX-License-Identifier: Apache-2.0
"""Arrays of every framework as the torch tensors that vendors' operators take, over the same memory, and results back.

torch tensors pass as they are. NumPy arrays go there by DLPack, and results come back as views. JAX arrays come as the buffers
of a callback into this process that is part of the compiled program, and results are written into the program's own buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, framework_of, numpy_dtype
from ..interface import Forward
from ..spec import NormSpec, Problem
from . import guards


class Given(NamedTuple):
    """Contiguous torch tensors: x and residual of shape (rows, hidden_size), weight and bias of shape (hidden_size,)."""

    x: Any
    residual: Any
    weight: Any
    bias: Any


class Results(NamedTuple):
    """Contiguous torch tensors of shape (rows, hidden_size); residual_out is None where there is no residual."""

    y: Any
    residual_out: Any


Compute = Callable[[NormSpec, Given, Results | None], Results]
"""Runs a vendor's operators. Given results, it writes there, which may be the memory of x and of residual; given None, it takes
memory of its own. It writes nowhere else."""


def forward(
    compute: Compute,
    problem: Problem,
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    overwrites: bool = False,
) -> Forward:
    """Compute y and residual_out with a vendor's operators; x and residual stay as they are.

    Args:
        compute: runs the operators.
        problem: the call.
        x: as given to the call.
        residual: as given to the call.
        weight: as given to the call.
        bias: as given to the call.
        overwrites: whether the operators work in the memory of x and residual. In JAX on a GPU these are then better copied by
            XLA, which knows where it need not; on the CPU XLA takes longer for it than torch.

    Raises:
        ShapeError: an array is not of the shape that the problem says.
        DtypeError: an array is not of the dtype that the problem says.
    """
    guards.check(problem, {"x": x, "residual": residual, "weight": weight, "bias": bias})
    if framework_of(x) == "jax":
        from .callback import forward as call_from_jax

        return call_from_jax(
            compute, problem, (x, residual, weight, bias), problem.in_place or (overwrites and problem.platform != "cpu")
        )
    given = _given(problem, x, residual, weight, bias)
    results = compute(problem.spec, given, None) if problem.rows else _clones(given)
    if framework_of(x) == "numpy":
        results = Results(*(None if result is None else _numpy(result) for result in results))
    y, residual_out = (None if result is None else result.reshape(problem.shape) for result in results)
    return Forward(y, residual_out, None, None)


def _clones(given: Given) -> Results:
    return Results(given.x.clone(), None if given.residual is None else given.residual.clone())


def forward_(compute: Compute, problem: Problem, x: Array, residual: Array, weight: Array | None, bias: Array | None) -> None:
    """Write y into x and residual_out into residual, which are torch tensors."""
    guards.check(problem, {"x": x, "residual": residual, "weight": weight, "bias": bias})
    given = _given(problem, x, residual, weight, bias)
    if problem.rows:
        compute(problem.spec, given, Results(given.x, given.residual))


def _given(problem: Problem, *arrays: Array | None) -> Given:
    """Return the arrays as tensors over the same memory; one that is not contiguous is copied."""
    shapes = [(problem.rows, problem.hidden_size)] * 2 + [problem.shape[-1:]] * 2
    pairs = zip(arrays, shapes, strict=True)
    return Given(*(None if array is None else _tensor(array).contiguous().view(shape) for array, shape in pairs))


def _tensor(array: Array) -> Any:
    import torch
    from torch.utils.dlpack import from_dlpack

    if framework_of(array) == "torch":
        return array
    # torch has no tensors that cannot be written, and ends the process over a negative stride
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    if array.dtype == numpy_dtype("bfloat16"):
        # NumPy's side of DLPack does not know bfloat16
        return from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return from_dlpack(array)


def _numpy(tensor: Any) -> Any:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()
