# SPDX-License-Identifier: Apache-2.0
"""normkit for JAX: fused residual normalisation as functions and pytrees."""

from normkit.errors import MissingPackageError
from normkit.registry import Verdict

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise MissingPackageError(f"normkit_jax needs the package jax: pip install jax ({error})") from error

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
from .target import target

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
    "rms_norm",
    "target",
]
