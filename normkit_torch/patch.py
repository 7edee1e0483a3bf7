# SPDX-License-Identifier: Apache-2.0
"""`load` and `load_no_bias` for torch.nn.LayerNorm itself, as LoRAX and text-generation-inference have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normkit.checkpoint import Weights, as_weights

LayerNorm = TypeVar("LayerNorm", bound=nn.LayerNorm)

_before: dict[str, Any] = {}


def load_layer_norm(
    cls: type[LayerNorm],
    prefix: str,
    weights: Weights | Mapping[str, Tensor],
    eps: float,
    *,
    has_bias: bool,
    **options: Any,
) -> LayerNorm:
    """Make a layer norm from `{prefix}.weight` and, if it has a bias, `{prefix}.bias`; the parameters are these tensors.

    Args:
        cls: torch.nn.LayerNorm or a subclass.
        prefix: such as "transformer.h.0.ln_1".
        weights: anything with get_tensor(name), or a mapping from names to tensors.
        eps: inside the root.
        has_bias: whether to load the bias, or to have none.
        **options: as for the constructor of cls.

    Raises:
        MissingTensorError: there is no such tensor.
    """
    source = as_weights(weights)
    weight = torch.as_tensor(source.get_tensor(f"{prefix}.weight"))
    bias = torch.as_tensor(source.get_tensor(f"{prefix}.bias")) if has_bias else None
    with torch.device("meta"):  # its own parameters are replaced at once
        norm = cls(weight.shape[0], eps=eps, bias=has_bias, **options)
    norm.weight = nn.Parameter(weight)
    if bias is not None:
        norm.bias = nn.Parameter(bias)
    return norm


def patch_layer_norm() -> None:
    """Give torch.nn.LayerNorm the classmethods `load(prefix, weights, eps)` and `load_no_bias(prefix, weights, eps)`.

    Called twice, it does nothing the second time. `unpatch_layer_norm` puts back what was there before.

    Example:
        >>> import torch
        >>> patch_layer_norm()
        >>> torch.nn.LayerNorm.load_no_bias("ln_f", {"ln_f.weight": torch.ones(4)}, eps=1e-5)
        LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=False)
        >>> unpatch_layer_norm()
    """
    if _before:
        return
    for name, has_bias in (("load", True), ("load_no_bias", False)):
        _before[name] = nn.LayerNorm.__dict__.get(name)
        setattr(nn.LayerNorm, name, classmethod(_loader(has_bias)))


def unpatch_layer_norm() -> None:
    """Undo `patch_layer_norm`."""
    for name, method in _before.items():
        if method is None:
            delattr(nn.LayerNorm, name)
        else:
            setattr(nn.LayerNorm, name, method)
    _before.clear()


def _loader(has_bias: bool) -> Any:
    def load(cls: type[nn.LayerNorm], prefix: str, weights: Weights | Mapping[str, Tensor], eps: float) -> nn.LayerNorm:
        return load_layer_norm(cls, prefix, weights, eps, has_bias=has_bias)

    return load
