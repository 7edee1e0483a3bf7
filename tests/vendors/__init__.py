# SPDX-License-Identifier: Apache-2.0
"""Tests of the vendors' real packages, in environments made by make_env.sh; tests/test_vendors.py runs them there."""
