# SPDX-License-Identifier: Apache-2.0
"""Kernel + plan + target -> machine code, through triton.compile. Needs no GPU and no driver."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import OptionError
from .interface import Wanted
from .plan import Step, backward_plan, forward_plan
from .spec import Problem

_TRITON_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FLOAT_ARGUMENTS = ("eps", "weight_offset")
_STRIDES = ("_outer", "_inner")
_ALIGNED: list[list[Any]] = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code of one step for one architecture.

    Attributes:
        name: symbol of the kernel in `binary`.
        arch: "sm_90", "gfx942", ...
        binary: cubin or hsaco.
        assembly: PTX or AMD GCN text.
        shared: bytes of shared memory per program.
        num_warps: warps per program.
        arguments: the run-time arguments in order, with Triton's name for each type ("*bf16", "i32", "fp32").
    """

    name: str
    arch: str
    binary: bytes
    assembly: str
    shared: int
    num_warps: int
    arguments: dict[str, str]


def operand_dtypes(problem: Problem) -> dict[str, str | None]:
    """Return the dtype behind each pointer argument of the kernels, None for one that is absent."""
    statistics = problem.compute_dtype if problem.needs_grad else None
    return {
        "x": problem.x_dtype,
        "residual": problem.residual_dtype,
        "weight": problem.weight_dtype,
        "bias": problem.bias_dtype,
        "y": problem.out_dtype,
        "residual_out": problem.residual_out_dtype,
        "mean": statistics if problem.spec.subtract_mean else None,
        "rstd": statistics,
    }


def gradient_dtypes(problem: Problem, wanted: Wanted) -> dict[str, str | None]:
    """Return the same for the backward kernels."""
    shares = problem.compute_dtype if wanted.dx or wanted.dresidual else None
    return {
        "dy": problem.out_dtype,
        "dresidual_out": problem.residual_out_dtype,
        "h": problem.h_dtype,
        "weight": problem.weight_dtype,
        "mean": problem.compute_dtype if problem.spec.subtract_mean else None,
        "rstd": problem.compute_dtype,
        "dx": problem.x_dtype if wanted.dx else None,
        "dresidual": problem.residual_dtype if wanted.dresidual else None,
        "dweight": problem.compute_dtype if wanted.dweight else None,
        "dbias": problem.compute_dtype if wanted.dbias else None,
        "x_hat_g": shares,
        "g": shares if problem.spec.subtract_mean else None,
    }


def compile_forward(problem: Problem, arch: str) -> CompiledKernel:
    """Compile the planned forward kernel of a problem for "sm_NN" or "gfxNNN", for 16-byte aligned arrays."""
    return compile_step(forward_plan(problem), operand_dtypes(problem), arch)


def compile_backward(problem: Problem, wanted: Wanted, arch: str) -> list[CompiledKernel]:
    """Compile all planned backward kernels of a problem: its steps, then the total of dweight and that of dbias."""
    plan = backward_plan(problem, wanted)
    dtypes = gradient_dtypes(problem, wanted)
    compiled = [compile_step(step, dtypes, arch) for step in plan.steps]
    for gradient, parameter in (("dweight", problem.weight_dtype), ("dbias", problem.bias_dtype)):
        if dtypes[gradient]:
            compiled.append(compile_step(plan.total, {"partial": dtypes[gradient], "total": parameter}, arch))
    return compiled


def compile_step(step: Step, dtypes: Mapping[str, str | None], arch: str) -> CompiledKernel:
    """Compile one step, as it is launched where every array starts at a multiple of 16 bytes.

    Strides of rows that are not contiguous are taken for multiples of 16 elements that fit 32 bits.

    Args:
        step: as planned.
        dtypes: the dtype behind each pointer argument, by operand name; one without is absent.
        arch: "sm_NN" or "gfxNNN".
    """
    return _compile(step.kernel, tuple(step.constants.items()), step.num_warps, tuple(dtypes.items()), arch)


@cache
def _compile(
    kernel_name: str,
    step_constants: tuple[tuple[str, int | str | bool], ...],
    num_warps: int,
    dtypes: tuple[tuple[str, str | None], ...],
    arch: str,
) -> CompiledKernel:
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    from . import kernels

    target = _target(arch)
    kernel = getattr(kernels, kernel_name)
    signature, constants, attributes = _signature(kernel.arg_names, dict(step_constants), dict(dtypes))
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if arch.startswith("sm_"):
        # the oldest PTX that knows the architecture, so that any driver's or framework's assembler can read it
        options["ptx_version"] = 87 if int(arch[3:]) >= 100 else 80
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton_compile(source, target=target, options=options)
    binary, assembly = ("cubin", "ptx") if arch.startswith("sm_") else ("hsaco", "amdgcn")
    return CompiledKernel(
        name=compiled.metadata.name,
        arch=arch,
        binary=compiled.asm[binary],
        assembly=compiled.asm[assembly],
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        arguments={name: kind for name, kind in signature.items() if kind != "constexpr"},
    )


def _signature(
    names: list[str], step_constants: Mapping[str, int | str | bool], dtypes: Mapping[str, str | None]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(step_constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            dtype = dtypes.get(name.removesuffix("_ptr"))
            if dtype is None:
                signature[name], constants[name] = "constexpr", None
            else:
                signature[name] = f"*{_TRITON_DTYPES[dtype]}"
                attributes[(index,)] = _ALIGNED
        elif name in _FLOAT_ARGUMENTS:
            signature[name] = "fp32"
        elif name.endswith(_STRIDES) and constants["CONTIGUOUS"]:
            signature[name], constants[name] = "constexpr", 0
        else:
            signature[name] = "i32"
            if name.endswith(_STRIDES):
                attributes[(index,)] = _ALIGNED
    return signature, constants, attributes


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_\d{2,3}", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise OptionError(f"arch={arch!r} is not known: an NVIDIA one is written like sm_90, an AMD one like gfx942")
