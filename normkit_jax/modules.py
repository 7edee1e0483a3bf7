# SPDX-License-Identifier: Apache-2.0
"""The norms of a pre-norm transformer as pytrees, loaded from a checkpoint: `normed, residual = norm(hidden, residual)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

from normkit.arrays import dtype_name, framework_of
from normkit.checkpoint import Weights, as_weights
from normkit.spec import NormSpec

from .dispatch import ArrayLike
from .functional import add_layer_norm, add_rms_norm


class _Module:
    @classmethod
    def _of(cls, parameters: dict[str, Array], options: dict[str, Any]) -> Self:
        return cls(**parameters, **options)


class RMSModule(_Module):
    """What FastRMSNorm is in every library: parameter and options of these names, loaded and called in one way."""

    weight: Any
    eps: float
    weight_offset: float
    rounding: str | None
    implementation: str | None

    @classmethod
    def load(
        cls,
        prefix: str,
        weights: Weights | Mapping[str, ArrayLike],
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        rounding: str | None = None,
        implementation: str | None = None,
    ) -> Self:
        """Load `{prefix}.weight`.

        Args:
            prefix: such as "model.layers.0.input_layernorm".
            weights: anything with get_tensor(name), or a mapping from names to arrays.
            eps: inside the root.
            weight_offset: 1.0 for Gemma.
            rounding: None, "sum", "stored" or "hf"; see `normkit_jax.add_rms_norm`.
            implementation: one by name; None chooses at each call.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        options = {"eps": eps, "weight_offset": weight_offset, "rounding": rounding, "implementation": implementation}
        return cls._of(_loaded(prefix, weights, "weight"), options)

    def __call__(self, hidden_states: ArrayLike, residual: ArrayLike | None = None) -> tuple[Array, Array]:
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


class LayerModule(_Module):
    """What FastLayerNorm is in every library: parameters and options of these names, loaded and called in one way."""

    weight: Any
    bias: Any
    eps: float
    rounding: str | None
    implementation: str | None

    @classmethod
    def load(
        cls,
        prefix: str,
        weights: Weights | Mapping[str, ArrayLike],
        eps: float,
        *,
        rounding: str | None = None,
        implementation: str | None = None,
    ) -> Self:
        """Load `{prefix}.weight` and `{prefix}.bias`. Arguments as in `FastRMSNorm.load`, without weight_offset."""
        options = {"eps": eps, "rounding": rounding, "implementation": implementation}
        return cls._of(_loaded(prefix, weights, "weight", "bias"), options)

    @classmethod
    def load_no_bias(
        cls,
        prefix: str,
        weights: Weights | Mapping[str, ArrayLike],
        eps: float,
        *,
        rounding: str | None = None,
        implementation: str | None = None,
    ) -> Self:
        """Load `{prefix}.weight`, without a bias. Arguments as in `FastRMSNorm.load`, without weight_offset."""
        options = {"eps": eps, "rounding": rounding, "implementation": implementation}
        return cls._of(_loaded(prefix, weights, "weight"), options)

    def __call__(self, hidden_states: ArrayLike, residual: ArrayLike | None = None) -> tuple[Array, Array]:
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


def _loaded(prefix: str, weights: Weights | Mapping[str, ArrayLike], *names: str) -> dict[str, Array]:
    source = as_weights(weights)
    return {name: _array(source.get_tensor(f"{prefix}.{name}")) for name in names}


def _array(tensor: Any) -> Array:
    if framework_of(tensor) == "torch":
        tensor = tensor.detach().cpu()
        if dtype_name(tensor.dtype) == "bfloat16":  # which torch does not give to NumPy
            return jnp.asarray(tensor.float(), jnp.bfloat16)
    return jnp.asarray(tensor)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight"],
    meta_fields=["eps", "weight_offset", "rounding", "implementation"],
)
@dataclass(eq=False, repr=False)  # arrays compare element by element, which a generated comparison cannot use
class FastRMSNorm(RMSModule):
    r"""RMSNorm of the residual stream, $y = h / \sqrt{\operatorname{mean}(h^2) + \text{eps}} \cdot (\text{weight\_offset} +
    \text{weight})$ with h = hidden_states + residual. A pytree whose one leaf is the weight: pass it to jit and grad.

    Args:
        weight: of shape (hidden_size,).
        eps: inside the root.
        weight_offset: 1.0 for Gemma.
        rounding: None, "sum", "stored" or "hf"; see `add_rms_norm`.
        implementation: one by name; None chooses at each call.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = FastRMSNorm.load("model.norm", {"model.norm.weight": jnp.ones(2)}, eps=0.0)
        >>> normed, residual = norm(jnp.array([[1.0, 3.0]]), jnp.array([[2.0, -6.0]]))
        >>> normed, residual
        (Array([[ 1., -1.]], dtype=float32), Array([[ 3., -3.]], dtype=float32))
    """

    weight: Array
    eps: float = 1e-6
    weight_offset: float = 0.0
    rounding: str | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        _check("rms", self.eps, self.weight_offset, self.rounding)

    def __repr__(self) -> str:
        return _described(self)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "bias"],
    meta_fields=["eps", "rounding", "implementation"],
)
@dataclass(eq=False, repr=False)  # arrays compare element by element, which a generated comparison cannot use
class FastLayerNorm(LayerModule):
    r"""LayerNorm of the residual stream, $y = (h - \operatorname{mean}(h)) / \sqrt{\operatorname{var}(h) + \text{eps}} \cdot
    \text{weight} + \text{bias}$ with h = hidden_states + residual. A pytree whose leaves are weight and bias.

    Args:
        weight: of shape (hidden_size,), or None for ones.
        bias: of shape (hidden_size,), or None for none.
        eps: inside the root.
        rounding: None, "sum", "stored" or "hf"; see `add_layer_norm`.
        implementation: one by name; None chooses at each call.

    Example:
        >>> import jax.numpy as jnp
        >>> norm = FastLayerNorm.load_no_bias("ln_f", {"ln_f.weight": jnp.ones(2)}, eps=0.0)
        >>> norm(jnp.array([[1.0, 3.0]]))[0]
        Array([[-1.,  1.]], dtype=float32)
    """

    weight: Array | None
    bias: Array | None = None
    eps: float = 1e-5
    rounding: str | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        _check("layer", self.eps, 0.0, self.rounding)

    def __repr__(self) -> str:
        return _described(self)


_known_spec = lru_cache(maxsize=128)(NormSpec)  # JAX makes pytrees anew again and again


def _check(*options: Any) -> None:
    """Refuse what is no option now, and not in the first call."""
    try:
        _known_spec(*options)
    except TypeError:  # what has no hash
        NormSpec(*options)


def _described(norm: FastRMSNorm | FastLayerNorm) -> str:
    """Return what a dataclass shows of itself, with types in place of arrays."""
    values = {field.name: getattr(norm, field.name) for field in fields(norm)}
    shown = (f"{name}={jax.typeof(of) if isinstance(of, jax.Array) else repr(of)}" for name, of in values.items())
    return f"{type(norm).__name__}({', '.join(shown)})"
