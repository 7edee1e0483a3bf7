# SPDX-License-Identifier: Apache-2.0
"""The public functions for torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit import registry
from normkit.call import bind
from normkit.registry import Verdict

from . import dispatch, transforms
from .implementations import TABLE
from .route import compute


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | str | None = None,
    implementation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Normalise each row by its root mean square.

    $$y = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \text{eps}}} (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    Arguments, errors and arithmetic are those of `add_rms_norm`; residual_dtype must be None, as no residual is returned.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[1.0, 7.0]]), eps=0.0)
        tensor([[0.2000, 1.4000]])
    """
    return compute(
        "rms_norm",
        (x, None, weight, bias, out, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | str | None = None,
    implementation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Normalise each row to mean 0 and variance 1.

    $$y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{var}(x) + \text{eps}}}
      (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with the biased variance. Arguments, errors and arithmetic are those of `add_rms_norm`; residual_dtype must be None.

    Example:
        >>> import torch
        >>> layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    return compute(
        "layer_norm",
        (x, None, weight, bias, out, None),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | str | None = None,
    implementation: str | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add the residual and normalise each row of the sum by its root mean square (arXiv:1910.07467).

    $$h = x + \text{residual}, \qquad
      y = \frac{h}{\sqrt{\operatorname{mean}(h^2) + \text{eps}}} (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    Inputs are never changed. Arithmetic is in float32 (in float64 as soon as a tensor is float64), rounded once at the end;
    torch.autocast changes neither that nor a dtype: y has x's. Gradients, of any order, flow through both results to every
    tensor that asks.

    Args:
        x: tensor of shape (..., hidden_size); float32, bfloat16, float16 or float64; any strides.
        residual: of x's shape, any of these dtypes. With None, h is x, and residual_out is x itself.
        weight: of shape (hidden_size,), any of these dtypes; None means ones.
        bias: of shape (hidden_size,), any of these dtypes; None means zeros.
        eps: added to the mean square, inside the root.
        weight_offset: added to the weight, 1.0 for Gemma; needs a weight.
        rounding: which h is normalised. "sum": the unrounded sum. "stored": the sum rounded to residual_out's dtype, so that
            fused equals unfused. "hf": "stored", and the normalised value is rounded to x's dtype before it meets the weight,
            as in Hugging Face's LlamaRMSNorm. None: whichever the implementation does best.
        residual_dtype: dtype of residual_out; by default that of residual, or of x without one.
        out_dtype: dtype of y; by default that of x.
        implementation: one by name, as `explain` lists them; None chooses.
        out: tensor that y is written to, so that a loop can use its memory again: of y's shape and dtype, any strides, in the
            memory of no other tensor of the call, and where no gradient is needed. By default y is a new tensor.
        residual_out: the same for residual_out; without a residual, x is copied there.

    Returns:
        y and residual_out, the h handed on, both of x's shape: `out` and `residual_out` themselves where they are given,
        else contiguous.

    Raises:
        ShapeError: the shapes do not belong together.
        DtypeError: a tensor is not of a supported dtype, or not a tensor.
        DeviceError: the tensors are on different devices.
        OptionError: an option has a value it cannot have, or a tensor cannot be written to.
        UnsupportedError: the implementation asked for cannot compute this.

    Example:
        >>> import torch
        >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]])
        >>> add_rms_norm(x, residual, eps=0.0)
        (tensor([[0.2000, 1.4000]]), tensor([[1., 7.]]))
        >>> out, residual_out = torch.empty_like(x), torch.empty_like(x)
        >>> add_rms_norm(x, residual, eps=0.0, out=out, residual_out=residual_out)[0] is out
        True
    """
    return compute(
        "add_rms_norm",
        (x, residual, weight, bias, out, residual_out),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    residual_dtype: torch.dtype | str | None = None,
    out_dtype: torch.dtype | str | None = None,
    implementation: str | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add the residual and normalise each row of the sum to mean 0 and variance 1 (arXiv:1607.06450).

    $$h = x + \text{residual}, \qquad y = \frac{h - \operatorname{mean}(h)}{\sqrt{\operatorname{var}(h) + \text{eps}}}
      (\text{weight\_offset} + \text{weight}) + \text{bias}$$

    with the biased variance, computed from the centred values. All else is as in `add_rms_norm`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> add_layer_norm(x, x, eps=0.0)
        (tensor([[-1.2247,  0.0000,  1.2247]]), tensor([[2., 4., 6.]]))
    """
    return compute(
        "add_layer_norm",
        (x, residual, weight, bias, out, residual_out),
        (eps, weight_offset, rounding, residual_dtype, out_dtype, implementation),
    )


def add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Do as `add_rms_norm` does, in place: x becomes y and residual becomes residual_out; no memory is allocated for them.

    Returns:
        x and residual.

    Raises:
        OptionError: a gradient would be needed, x and residual share memory, or one of them is expanded.

    Example:
        >>> import torch
        >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]])
        >>> y, residual_out = add_rms_norm_(x, residual, eps=0.0)
        >>> y is x, residual
        (True, tensor([[1., 7.]]))
    """
    return compute(
        "add_rms_norm_", (x, residual, weight, bias, None, None), (eps, weight_offset, rounding, None, None, implementation)
    )


def add_layer_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    rounding: str | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Do as `add_layer_norm` does, in place: x becomes y and residual becomes residual_out. See `add_rms_norm_`.

    Example:
        >>> import torch
        >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]])
        >>> add_layer_norm_(x, residual, eps=0.0)
        (tensor([[-1.,  1.]]), tensor([[1., 7.]]))
    """
    return compute(
        "add_layer_norm_", (x, residual, weight, bias, None, None), (eps, weight_offset, rounding, None, None, implementation)
    )


def explain(function: str, x: Tensor, *arrays: Tensor | None, **options: Any) -> list[Verdict]:
    """Say which implementation a call of one of the functions takes, and why not the others; nothing is computed.

    Args:
        function: the function's name, such as "add_rms_norm".
        x: as for that function; so are all other arguments.
        *arrays: residual, weight and bias.
        **options: the keyword arguments.

    Returns:
        One Verdict for each implementation, in the order in which they are tried; the first one accepted runs.

    Example:
        >>> import torch
        >>> for verdict in explain("rms_norm", torch.ones(2, 8))[-2:]:
        ...     print(verdict.name, verdict.accepted, verdict.reason)
        cpu True computes this on cpu
        reference True computes this on cpu
    """
    call = bind(globals(), function, x, *arrays, **options)
    verdicts = registry.explain(dispatch.problem_of(call, transforms.needs_grad(*call.parts()[1])), TABLE)
    if transforms.active():
        taken = None if call.writes else "reference"
        return [one if one.name == taken else Verdict(one.name, False, f"not {transforms.WHY}") for one in verdicts]
    return verdicts
