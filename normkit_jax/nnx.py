# SPDX-License-Identifier: Apache-2.0
"""The norms of `normkit_jax` as modules of flax.nnx: `normed, residual = norm(hidden, residual)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from normkit.errors import MissingPackageError
from normkit.spec import NormSpec

from .modules import LayerModule, RMSModule

try:
    from flax import nnx
except ImportError as error:
    raise MissingPackageError(f"normkit_jax.nnx needs the package flax: pip install flax ({error})") from error

Initializer = Callable[..., Any]
"""Makes an array of key, shape and dtype, as those of jax.nn.initializers do."""

Norm = TypeVar("Norm")


class FastRMSNorm(RMSModule, nnx.Module):
    r"""RMSNorm of the residual stream, $y = h / \sqrt{\operatorname{mean}(h^2) + \text{eps}} \cdot (\text{weight\_offset} +
    \text{weight})$ with h = hidden_states + residual. Its one nnx.Param is `weight`, of shape (hidden_size,).

    Args:
        hidden_size: length of a row.
        eps: inside the root.
        weight_offset: 1.0 for Gemma.
        rounding: None, "sum", "stored" or "hf"; see `normkit_jax.add_rms_norm`.
        implementation: one by name; None chooses at each call.
        param_dtype: dtype of the weight.
        weight_init: makes the weight; by default 1 - weight_offset, with which rows are only normalised.
        rngs: where the initializer's key comes from, as in flax's own norms; the default needs none.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> norm = FastRMSNorm(2, eps=0.0, rngs=nnx.Rngs(0))
        >>> normed, residual = norm(jnp.array([[1.0, 3.0]]), jnp.array([[2.0, -6.0]]))
        >>> normed, residual
        (Array([[ 1., -1.]], dtype=float32), Array([[ 3., -3.]], dtype=float32))
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        rounding: str | None = None,
        implementation: str | None = None,
        param_dtype: DTypeLike = jnp.float32,
        weight_init: Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        NormSpec("rms", eps, weight_offset, rounding)  # refuses what is no option now, and not in the first call
        weight_init = weight_init or nnx.initializers.constant(1 - weight_offset)
        self.weight = _parameter(weight_init, hidden_size, param_dtype, rngs)
        self.eps = eps
        self.weight_offset = weight_offset
        self.rounding = rounding
        self.implementation = implementation

    @classmethod
    def _of(cls, parameters: dict[str, Array], options: dict[str, Any]) -> Self:
        return _made(cls(parameters["weight"].size, **options), parameters)


class FastLayerNorm(LayerModule, nnx.Module):
    r"""LayerNorm of the residual stream, $y = (h - \operatorname{mean}(h)) / \sqrt{\operatorname{var}(h) + \text{eps}} \cdot
    \text{weight} + \text{bias}$ with h = hidden_states + residual. Its nnx.Params are `weight` and, unless None, `bias`.

    Args:
        hidden_size: length of a row.
        eps: inside the root.
        use_bias: whether there is a bias.
        rounding: None, "sum", "stored" or "hf"; see `normkit_jax.add_rms_norm`.
        implementation: one by name; None chooses at each call.
        param_dtype: dtype of weight and bias.
        weight_init: makes the weight.
        bias_init: makes the bias.
        rngs: where the initializers' keys come from, as in flax's own norms; the defaults need none.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = FastLayerNorm.load_no_bias("ln_f", {"ln_f.weight": jnp.ones(2)}, eps=0.0)
        >>> norm(jnp.array([[1.0, 3.0]]))[0]
        Array([[-1.,  1.]], dtype=float32)
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        use_bias: bool = True,
        rounding: str | None = None,
        implementation: str | None = None,
        param_dtype: DTypeLike = jnp.float32,
        weight_init: Initializer = nnx.initializers.ones,
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        NormSpec("layer", eps, rounding=rounding)
        self.weight = _parameter(weight_init, hidden_size, param_dtype, rngs)
        self.bias = _parameter(bias_init, hidden_size, param_dtype, rngs) if use_bias else None
        self.eps = eps
        self.rounding = rounding
        self.implementation = implementation

    @classmethod
    def _of(cls, parameters: dict[str, Array], options: dict[str, Any]) -> Self:
        return _made(cls(parameters["weight"].size, use_bias="bias" in parameters, **options), parameters)


def _made(norm: Norm, parameters: dict[str, Array]) -> Norm:
    for name, array in parameters.items():
        setattr(norm, name, nnx.Param(array))
    return norm


def _parameter(init: Initializer, size: int, dtype: DTypeLike, rngs: nnx.Rngs | None) -> nnx.Param[Array]:
    return nnx.Param(init(None if rngs is None else rngs.params(), (size,), dtype))
