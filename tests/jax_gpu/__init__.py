# SPDX-License-Identifier: Apache-2.0
"""What the tests of the JAX front end on GPUs share. None of them needs a GPU."""
