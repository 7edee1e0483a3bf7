# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, shared by all front ends. Importing this package imports triton and nothing else."""

from .backward import backward_rows, backward_twice, sum_partials
from .backward_long import backward_columns, backward_long
from .forward import forward_long, forward_rows

__all__ = [
    "backward_columns",
    "backward_long",
    "backward_rows",
    "backward_twice",
    "forward_long",
    "forward_rows",
    "sum_partials",
]
