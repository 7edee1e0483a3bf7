# SPDX-License-Identifier: Apache-2.0
"""Tests of the JAX front end on arrays that are sharded over eight devices of the CPU."""
