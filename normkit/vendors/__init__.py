# SPDX-License-Identifier: Apache-2.0
"""Operators of vendors' libraries, which take torch tensors and check next to nothing: guarded, and for every framework."""
