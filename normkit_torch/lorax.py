# SPDX-License-Identifier: Apache-2.0
"""Drop-in for the norm layers of LoRAX and text-generation-inference: the same class names, classmethods and attributes.

Importing this module calls `patch_layer_norm`, so that torch.nn.LayerNorm has `load` and `load_no_bias` too. Where those
servers write `from lorax_server.utils.layers import FastLayerNorm, FastRMSNorm`, write:

    from normkit_torch.lorax import FastLayerNorm, FastRMSNorm
"""

from __future__ import annotations

from .modules import FastLayerNorm
from .modules import FastRMSNorm as _FastRMSNorm
from .patch import patch_layer_norm

__all__ = ["FastLayerNorm", "FastRMSNorm"]

patch_layer_norm()


class FastRMSNorm(_FastRMSNorm):
    """`normkit_torch.FastRMSNorm` with the attribute name that code written for these servers reads.

    Example:
        >>> import torch
        >>> FastRMSNorm.load("norm", {"norm.weight": torch.ones(4)}, eps=1e-5).variance_epsilon
        1e-05
    """

    @property
    def variance_epsilon(self) -> float:
        """The eps, under Hugging Face's name."""
        return self.eps

    @variance_epsilon.setter
    def variance_epsilon(self, value: float) -> None:
        self.eps = value
