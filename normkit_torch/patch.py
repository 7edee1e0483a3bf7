# SPDX-License-Identifier: Apache-2.0
"""`load` and `load_no_bias` for torch.nn.LayerNorm itself, as LoRAX and text-generation-inference have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from normkit.arrays import FLOAT_DTYPES, dtype_name, not_an_array
from normkit.checkpoint import Weights, as_weights
from normkit.errors import DtypeError, ShapeError

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
    weight = load_parameter(source, f"{prefix}.weight")
    bias = load_parameter(source, f"{prefix}.bias") if has_bias else None
    if bias is not None and bias.shape != weight.shape:
        raise ShapeError(
            f"{prefix}.bias must have the shape of {prefix}.weight, {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    with torch.device("meta"):  # its own parameters are replaced at once
        norm = cls(weight.shape[0], eps=eps, bias=has_bias, **options)
    norm.weight = weight
    if bias is not None:
        norm.bias = bias
    return norm


def load_parameter(weights: Weights, name: str) -> nn.Parameter:
    """Load a weight or bias, from a checkpoint of torch tensors or NumPy arrays; memory is shared where that is possible.

    Raises:
        ShapeError: it has another number of dimensions than one.
        DtypeError: it is not of a supported dtype.
        MissingTensorError: there is no such tensor.
    """
    tensor = weights.get_tensor(name)
    if isinstance(tensor, np.ndarray) and tensor.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16)
    return as_parameter(name, torch.as_tensor(tensor))


def as_parameter(name: str, tensor: Tensor) -> nn.Parameter:
    """Return a weight or bias as a parameter, after checking that a norm can have it."""
    if not isinstance(tensor, Tensor):
        raise not_an_array(name, tensor, "a torch.Tensor")
    if tensor.ndim != 1:
        raise ShapeError(f"{name} must have shape (hidden_size,), got {tuple(tensor.shape)}")
    if dtype_name(tensor.dtype) not in FLOAT_DTYPES:
        raise DtypeError(f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {tensor.dtype}")
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


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
