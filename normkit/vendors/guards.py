# SPDX-License-Identifier: Apache-2.0
"""What is refused before a vendor's code runs, which would read or write outside of its arrays, or compute something else."""

from __future__ import annotations

from typing import Any

from ..arrays import FLOAT_DTYPES, dtype_name
from ..errors import DtypeError, ShapeError
from ..spec import Problem

DEVICES = {"cpu": "cpu", "cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}
"""The type of torch's devices on each platform that a vendor has operators for."""


def refusal(problem: Problem, vendor: str) -> str | None:
    """Return why no operator of any vendor can compute a problem, None if one may.

    Args:
        problem: the call.
        vendor: what the operators belong to, for the sentence.
    """
    rows = [problem.x_dtype, problem.residual_dtype, problem.out_dtype, problem.residual_out_dtype]
    dtypes = [dtype for dtype in dict.fromkeys(rows) if dtype]
    if problem.platform not in DEVICES:
        return f"{vendor} has operators for {', '.join(DEVICES)}, not for {problem.platform}"
    if problem.portable:
        return f"{vendor} runs in this process, and the program is for others or for several platforms"
    if problem.needs_grad:
        return (
            f"{vendor} has no backward pass, and a gradient is asked for, as wherever an array requires one: "
            "where none is needed, compute under torch.inference_mode() or torch.no_grad(), or after requires_grad_(False)"
        )
    if problem.compute_dtype == "float64":
        return f"{vendor} computes in float32, which is not enough for float64"
    if len(dtypes) > 1:
        return f"{vendor} takes and gives x and residual in one dtype, and here are {' and '.join(dtypes)}"
    if problem.layout != "contiguous":
        return f"{vendor} reads and writes outside of rows that are not contiguous"
    if problem.platform != "cpu" and problem.rows * problem.hidden_size >= 2**31:
        return f"{vendor} counts elements in 32 bits, and there are {problem.rows * problem.hidden_size}"
    if problem.spec.weight_offset:
        return f"{vendor} has no weight_offset, and it is {problem.spec.weight_offset}"
    return None


def check(problem: Problem, arrays: dict[str, Any]) -> None:
    """Refuse arrays that are not those that a problem describes: the operators do not look.

    Args:
        problem: the call.
        arrays: x, residual, weight and bias by name, None for one that is absent.

    Raises:
        ShapeError: a shape is another one.
        DtypeError: a dtype is another one.
    """
    dtypes = {
        "x": problem.x_dtype,
        "residual": problem.residual_dtype,
        "weight": problem.weight_dtype,
        "bias": problem.bias_dtype,
    }
    for name, array in arrays.items():
        if array is None and dtypes[name] is None:
            continue
        found = None if array is None else dtype_name(array.dtype)
        if found != dtypes[name] or found not in FLOAT_DTYPES:
            raise DtypeError(f"the problem has {name} of dtype {dtypes[name]}, and what came is of {found}")
        expected = problem.shape if name in ("x", "residual") else problem.shape[-1:]
        if tuple(array.shape) != expected:
            raise ShapeError(f"the problem has {name} of shape {expected}, and what came is of {tuple(array.shape)}")
