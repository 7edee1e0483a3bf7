# SPDX-License-Identifier: Apache-2.0
"""The `cpu` implementation: C++ kernels behind a plain C interface, for NumPy here and for the front ends."""
