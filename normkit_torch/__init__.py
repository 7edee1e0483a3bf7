# SPDX-License-Identifier: Apache-2.0
"""normkit for PyTorch: fused residual normalisation as functions and modules."""

from normkit.errors import MissingPackageError
from normkit.registry import Verdict

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingPackageError(f"normkit_torch needs the package torch: pip install torch ({error})") from error

from .functional import (
    add_layer_norm,
    add_layer_norm_,
    add_rms_norm,
    add_rms_norm_,
    explain,
    layer_norm,
    rms_norm,
)
from .modules import FastLayerNorm, FastRMSNorm
from .patch import patch_layer_norm, unpatch_layer_norm

__all__ = [
    "FastLayerNorm",
    "FastRMSNorm",
    "Verdict",
    "add_layer_norm",
    "add_layer_norm_",
    "add_rms_norm",
    "add_rms_norm_",
    "explain",
    "layer_norm",
    "patch_layer_norm",
    "rms_norm",
    "unpatch_layer_norm",
]
