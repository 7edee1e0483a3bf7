# SPDX-License-Identifier: Apache-2.0
"""Why PyTorch calls with some of the kernels are not accepted any more: Triton could not compile, load or launch one."""

from normkit.failures import Failures

_failures = Failures()
reason, remembered = _failures.reason, _failures.remembered
