# SPDX-License-Identifier: Apache-2.0
"""The norms of a pre-norm transformer as modules, loaded from a checkpoint: `normed, residual = norm(hidden, residual)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normkit import registry
from normkit.checkpoint import Weights, as_weights
from normkit.errors import ShapeError
from normkit.spec import NormSpec

from .functional import add_layer_norm, add_rms_norm
from .implementations import TABLE
from .patch import as_parameter, load_layer_norm, load_parameter


class FastRMSNorm(nn.Module):
    r"""RMSNorm of the residual stream, $y = h / \sqrt{\operatorname{mean}(h^2) + \text{eps}} \cdot (\text{weight\_offset} +
    \text{weight})$ with h = hidden_states + residual.

    Args:
        weight: of shape (hidden_size,); becomes the parameter `weight`.
        eps: inside the root.
        weight_offset: 1.0 for Gemma.
        rounding: None, "sum", "stored" or "hf"; see `add_rms_norm`.
        implementation: one by name; None chooses at each call.

    Example:
        >>> import torch
        >>> norm = FastRMSNorm.load("model.norm", {"model.norm.weight": torch.ones(2)}, eps=0.0)
        >>> with torch.no_grad():
        ...     norm(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]]))
        (tensor([[0.2000, 1.4000]]), tensor([[1., 7.]]))
    """

    def __init__(
        self,
        weight: Tensor,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        rounding: str | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        _check("rms", eps, weight_offset, rounding, implementation)
        self.weight = as_parameter("weight", weight)
        self.eps = eps
        self.weight_offset = weight_offset
        self.rounding = rounding
        self.implementation = implementation

    @classmethod
    def load(cls, prefix: str, weights: Weights | Mapping[str, Tensor], eps: float = 1e-6, **options: Any) -> FastRMSNorm:
        """Load `{prefix}.weight`.

        Args:
            prefix: such as "model.layers.0.input_layernorm".
            weights: anything with get_tensor(name), or a mapping from names to tensors.
            eps: inside the root.
            **options: as for the constructor.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        return cls(load_parameter(as_weights(weights), f"{prefix}.weight"), eps, **options)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (normed, residual): residual is hidden_states + residual, or hidden_states itself if None was given."""
        return add_rms_norm(
            hidden_states,
            residual,
            self.weight,
            eps=self.eps,
            weight_offset=self.weight_offset,
            rounding=self.rounding,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """Describe the module as torch prints it."""
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.weight.shape[0]}, eps={self.eps}{offset}{_choices(self)}"


class FastLayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream: an `nn.LayerNorm` over the last dimension, called as norm(hidden_states, residual).

    Args:
        normalized_shape: hidden_size, as an int or a sequence of one.
        eps: inside the root.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        rounding: None, "sum", "stored" or "hf"; see `add_layer_norm`.
        implementation: one by name; None chooses at each call.

    Example:
        >>> import torch
        >>> norm = FastLayerNorm(2)
        >>> normed, residual = norm(torch.tensor([[1.0, 3.0]]))
        >>> [round(value, 3) for value in normed[0].tolist()]
        [-1.0, 1.0]
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rounding: str | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ShapeError(f"FastLayerNorm normalises the last dimension only, got normalized_shape={normalized_shape}")
        _check("layer", eps, 0.0, rounding, implementation)
        self.rounding = rounding
        self.implementation = implementation

    @classmethod
    def load(cls, prefix: str, weights: Weights | Mapping[str, Tensor], eps: float, **options: Any) -> FastLayerNorm:
        """Load `{prefix}.weight` and `{prefix}.bias`. Arguments as in `FastRMSNorm.load`."""
        return load_layer_norm(cls, prefix, weights, eps, has_bias=True, **options)

    @classmethod
    def load_no_bias(cls, prefix: str, weights: Weights | Mapping[str, Tensor], eps: float, **options: Any) -> FastLayerNorm:
        """Load `{prefix}.weight`, without a bias. Arguments as in `FastRMSNorm.load`."""
        return load_layer_norm(cls, prefix, weights, eps, has_bias=False, **options)

    def forward(  # type: ignore[override]  # an nn.LayerNorm that hands on the residual stream
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (normed, residual): residual is hidden_states + residual, or hidden_states itself if None was given."""
        return add_layer_norm(
            hidden_states,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            rounding=self.rounding,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """Describe the module as torch prints it."""
        return f"{super().extra_repr()}{_choices(self)}"


def _check(kind: str, eps: float, weight_offset: float, rounding: str | None, implementation: str | None) -> None:
    """Refuse what is no option now, and not in the first call."""
    NormSpec(kind, eps, weight_offset, rounding)
    if implementation is not None:
        registry.find(TABLE, implementation)


def _choices(norm: FastRMSNorm | FastLayerNorm) -> str:
    chosen = {"rounding": norm.rounding, "implementation": norm.implementation}
    return "".join(f", {name}={value!r}" for name, value in chosen.items() if value is not None)
