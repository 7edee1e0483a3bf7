# SPDX-License-Identifier: Apache-2.0
"""The norms of `normkit_jax` as modules of Equinox: `normed, residual = norm(hidden, residual)`."""

from __future__ import annotations

from typing import Any, Self, TypeVar

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from normkit.errors import MissingPackageError
from normkit.spec import NormSpec

from .modules import LayerModule, RMSModule

try:
    import equinox as eqx
except ImportError as error:
    raise MissingPackageError(f"normkit_jax.equinox needs the package equinox: pip install equinox ({error})") from error

Norm = TypeVar("Norm")


class FastRMSNorm(RMSModule, eqx.Module):
    r"""RMSNorm of the residual stream, $y = h / \sqrt{\operatorname{mean}(h^2) + \text{eps}} \cdot (\text{weight\_offset} +
    \text{weight})$ with h = hidden_states + residual. Its one leaf is the weight; all else is static.

    Unlike equinox.nn.RMSNorm it takes any leading dimensions, so that no vmap is needed. Under one the gradient of the
    weight is slower.

    Args:
        hidden_size: length of a row.
        eps: inside the root.
        weight_offset: 1.0 for Gemma.
        rounding: None, "sum", "stored" or "hf"; see `normkit_jax.add_rms_norm`.
        implementation: one by name; None chooses at each call.
        dtype: of the weight, which starts as 1 - weight_offset; None is JAX's default float.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = FastRMSNorm(2, eps=0.0)
        >>> normed, residual = norm(jnp.array([[1.0, 3.0]]), jnp.array([[2.0, -6.0]]))
        >>> normed, residual
        (Array([[ 1., -1.]], dtype=float32), Array([[ 3., -3.]], dtype=float32))
    """

    weight: Array
    eps: float = eqx.field(static=True)
    weight_offset: float = eqx.field(static=True)
    rounding: str | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        rounding: str | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        NormSpec("rms", eps, weight_offset, rounding)  # refuses what is no option now, and not in the first call
        self.weight = jnp.full(hidden_size, 1.0 - weight_offset, jnp.result_type(float) if dtype is None else dtype)
        self.eps = eps
        self.weight_offset = weight_offset
        self.rounding = rounding
        self.implementation = implementation

    @classmethod
    def _of(cls, parameters: dict[str, Array], options: dict[str, Any]) -> Self:
        return _made(cls(parameters["weight"].size, **options), parameters)


class FastLayerNorm(LayerModule, eqx.Module):
    r"""LayerNorm of the residual stream, $y = (h - \operatorname{mean}(h)) / \sqrt{\operatorname{var}(h) + \text{eps}} \cdot
    \text{weight} + \text{bias}$ with h = hidden_states + residual. Its leaves are weight and bias; all else is static.

    Unlike equinox.nn.LayerNorm it takes any leading dimensions, so that no vmap is needed. Under one the gradient of the
    weight is slower.

    Args:
        hidden_size: length of a row.
        eps: inside the root.
        use_bias: whether there is a bias; without one, `bias` is None.
        rounding: None, "sum", "stored" or "hf"; see `normkit_jax.add_rms_norm`.
        implementation: one by name; None chooses at each call.
        dtype: of weight and bias, which start as ones and zeros; None is JAX's default float.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = FastLayerNorm.load_no_bias("ln_f", {"ln_f.weight": jnp.ones(2)}, eps=0.0)
        >>> norm(jnp.array([[1.0, 3.0]]))[0]
        Array([[-1.,  1.]], dtype=float32)
    """

    weight: Array
    bias: Array | None
    eps: float = eqx.field(static=True)
    rounding: str | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        use_bias: bool = True,
        rounding: str | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        NormSpec("layer", eps, rounding=rounding)
        self.weight = jnp.ones(hidden_size, dtype)
        self.bias = jnp.zeros(hidden_size, dtype) if use_bias else None
        self.eps = eps
        self.rounding = rounding
        self.implementation = implementation

    @classmethod
    def _of(cls, parameters: dict[str, Array], options: dict[str, Any]) -> Self:
        return _made(cls(parameters["weight"].size, use_bias="bias" in parameters, **options), parameters)


def _made(norm: Norm, parameters: dict[str, Array]) -> Norm:
    return eqx.tree_at(lambda norm: [getattr(norm, name) for name in parameters], norm, list(parameters.values()))
