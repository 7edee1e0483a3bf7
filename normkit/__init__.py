# SPDX-License-Identifier: Apache-2.0
"""Fused residual normalisation for NumPy, PyTorch and JAX: one meaning, one choice of implementation, one set of kernels."""

from .checkpoint import MappingWeights, SafetensorsWeights, Weights
from .errors import (
    CheckpointError,
    DeviceError,
    DtypeError,
    LaunchError,
    MissingPackageError,
    MissingTensorError,
    NormkitError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from .functional import add_layer_norm, add_rms_norm, explain, layer_norm, rms_norm
from .registry import Verdict
from .spec import NormSpec

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DtypeError",
    "LaunchError",
    "MappingWeights",
    "MissingPackageError",
    "MissingTensorError",
    "NormSpec",
    "NormkitError",
    "OptionError",
    "SafetensorsWeights",
    "ShapeError",
    "UnsupportedError",
    "Verdict",
    "Weights",
    "add_layer_norm",
    "add_rms_norm",
    "explain",
    "layer_norm",
    "rms_norm",
]
