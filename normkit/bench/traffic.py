# SPDX-License-Identifier: Apache-2.0
"""The byte model, one for all contestants: what has to be read and written, each once, whatever a contestant moves beside."""

from __future__ import annotations

from ..arrays import numpy_dtype
from ..spec import Problem


def moved_bytes(problem: Problem, pass_: str) -> int:
    """Return the bytes that have to be moved.

    Forward: x, residual, weight and bias are read, y and residual_out are written. Backward: dy, dresidual_out, h, the
    statistics and weight are read; dx, dresidual where its dtype is another one, dweight and dbias are written.

    Args:
        problem: the call.
        pass_: "forward", "in-place", "backward", or "forward-and-backward", which also writes the statistics.

    Example:
        >>> from normkit.spec import NormSpec, Operand, describe
        >>> x, weight = Operand((10, 100), "float32"), Operand((100,), "float32")
        >>> moved_bytes(describe(NormSpec("rms"), x, x, weight), "forward") == 4 * (4 * 1000 + 100)
        True
    """

    def size(count: int, *dtypes: str | None) -> int:
        return sum(count * numpy_dtype(dtype).itemsize for dtype in dtypes if dtype)

    elements = problem.rows * problem.hidden_size
    parameters = size(problem.hidden_size, problem.weight_dtype, problem.bias_dtype)
    forward = (
        size(elements, problem.x_dtype, problem.residual_dtype, problem.out_dtype, problem.residual_out_dtype) + parameters
    )
    if pass_ in ("forward", "in-place"):
        return forward
    statistics = size(problem.rows, problem.compute_dtype) * (2 if problem.spec.subtract_mean else 1)
    other = problem.residual_dtype if problem.residual_dtype != problem.x_dtype else None
    backward = size(elements, problem.out_dtype, problem.h_dtype, problem.residual_out_dtype, problem.x_dtype, other)
    backward += statistics + size(problem.hidden_size, problem.weight_dtype) + parameters
    return backward if pass_ == "backward" else forward + statistics + backward
