# SPDX-License-Identifier: Apache-2.0
"""One way to call each framework's front end with NumPy arrays, so that a test is written once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np

from normkit.interface import Wanted
from normkit.registry import Implementation

from .cases import Case, NumpyArray


class Framework:
    """What differs between the frameworks."""

    name: str
    module: str

    @property
    def front_end(self) -> Any:
        return import_module(self.module)

    @property
    def table(self) -> Sequence[Implementation]:
        return tuple(import_module(f"{self.module}.implementations").TABLE)

    def array(self, array: NumpyArray | None) -> Any:
        raise NotImplementedError

    def numpy(self, array: Any) -> NumpyArray | None:
        raise NotImplementedError

    def gradients(self, case: Case, arrays: dict[str, Any], implementation: str) -> tuple[Any, dict[str, Any]]:
        """Return residual_out (None if there is none) and the gradients of x, residual, weight and bias, of those given."""
        raise NotImplementedError

    def call(self, case: Case, arrays: dict[str, Any], implementation: str | None) -> tuple[Any, Any]:
        """Return y and residual_out, None for a function that returns none."""
        names = ("x", "residual", "weight", "bias") if case.function.startswith("add_") else ("x", "weight", "bias")
        function = getattr(self.front_end, case.function)
        result = function(*(arrays[name] for name in names), **case.options, implementation=implementation)
        return result if case.function.startswith("add_") else (result, None)


class NumPy(Framework):
    name, module = "numpy", "normkit"

    def array(self, array: NumpyArray | None) -> Any:
        return array

    def numpy(self, array: Any) -> NumpyArray | None:
        return None if array is None else np.asarray(array)

    def gradients(self, case: Case, arrays: dict[str, Any], implementation: str) -> tuple[Any, dict[str, Any]]:
        """NumPy arrays have no autograd: the implementation's own backward is called."""
        kernels = next(entry for entry in self.table if entry.name == implementation).load()
        problem = case.problem(needs_grad=True)
        given = [arrays[name] for name in ("x", "residual", "weight", "bias")]
        _, residual_out, mean, rstd = kernels.forward(problem, *given)
        h = arrays["x"] if residual_out is None else residual_out
        gradients = kernels.backward(
            problem, Wanted.by(problem), arrays["dy"], arrays["dresidual_out"], h, arrays["weight"], mean, rstd
        )
        return residual_out, dict(zip(("x", "residual", "weight", "bias"), gradients.by_operand(problem), strict=True))


@dataclass
class Torch(Framework):
    device: str = "cpu"
    name, module = "torch", "normkit_torch"

    def array(self, array: NumpyArray | None) -> Any:
        import torch

        if array is None:
            return None
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(array.copy()).to(self.device)

    def numpy(self, array: Any) -> NumpyArray | None:
        import torch

        if array is None:
            return None
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            return np.asarray(array.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
        return np.asarray(array.numpy())

    def gradients(self, case: Case, arrays: dict[str, Any], implementation: str) -> tuple[Any, dict[str, Any]]:
        import torch

        names = [name for name in ("x", "residual", "weight", "bias") if arrays[name] is not None]
        leaves = arrays | {name: arrays[name].detach().clone().requires_grad_() for name in names}
        y, residual_out = self.call(case, leaves, implementation)
        outputs, cotangents = [y], [arrays["dy"]]
        if arrays["dresidual_out"] is not None:
            outputs, cotangents = [y, residual_out], [arrays["dy"], arrays["dresidual_out"]]
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], cotangents)
        computed = None if arrays["dresidual_out"] is None else residual_out
        return computed, dict(zip(names, gradients, strict=True))


class Jax(Framework):
    name, module = "jax", "normkit_jax"

    def array(self, array: NumpyArray | None) -> Any:
        import jax.numpy as jnp

        return None if array is None else jnp.asarray(array)

    def numpy(self, array: Any) -> NumpyArray | None:
        return None if array is None else np.asarray(array)

    def gradients(self, case: Case, arrays: dict[str, Any], implementation: str) -> tuple[Any, dict[str, Any]]:
        import jax

        names = [name for name in ("x", "residual", "weight", "bias") if arrays[name] is not None]

        def function(*given: Any) -> Any:
            y, residual_out = self.call(case, arrays | dict(zip(names, given, strict=True)), implementation)
            return y, None if arrays["dresidual_out"] is None else residual_out

        (_, residual_out), vjp = jax.vjp(function, *(arrays[name] for name in names))
        return residual_out, dict(zip(names, vjp((arrays["dy"], arrays["dresidual_out"])), strict=True))


def step_by_step(framework: Framework) -> AbstractContextManager[Any]:
    """Return a context in which JAX computes one operation after another, as the other frameworks do, without XLA's fusion."""
    if framework.name != "jax":
        return nullcontext()
    import jax

    return jax.disable_jit()


def installed() -> dict[str, Framework]:
    """Return the frameworks that are installed, by name."""
    frameworks: dict[str, Framework] = {"numpy": NumPy()}
    if find_spec("torch"):
        import torch

        frameworks["torch"] = Torch("cuda" if torch.cuda.is_available() else "cpu")
    if find_spec("jax"):
        frameworks["jax"] = Jax()
    return frameworks
