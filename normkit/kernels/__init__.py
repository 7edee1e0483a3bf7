# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, shared by all front ends. Importing this package imports triton and nothing else."""

from .backward import backward_columns, backward_long, backward_rows, sum_partials
from .forward import forward_long, forward_rows

__all__ = ["backward_columns", "backward_long", "backward_rows", "forward_long", "forward_rows", "sum_partials"]
