# SPDX-License-Identifier: Apache-2.0
"""The one table of named cases, for tests and benchmarks: real models' shapes, and odd ones."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.arrays import numpy_dtype
from normkit.spec import NormSpec, Operand, Problem, describe

NumpyArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One workload. `tags`: "ci" small enough for the interpreter, "gpu" for a device, "bench" timed as well.

    `mean` and `scale` are those of x and the residual; None as a dtype means that the operand is absent.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    x: str = "bfloat16"
    residual: str | None = "bfloat16"
    weight: str | None = "bfloat16"
    bias: str | None = None
    eps: float = 1e-5
    weight_offset: float = 0.0
    rounding: str | None = None
    residual_dtype: str | None = None
    out_dtype: str | None = None
    mean: float = 0.0
    scale: float = 1.0
    tags: tuple[str, ...] = ("ci", "gpu")

    @property
    def spec(self) -> NormSpec:
        return NormSpec(self.kind, self.eps, self.weight_offset, self.rounding)

    @property
    def function(self) -> str:
        adds = self.residual is not None or self.residual_dtype is not None
        return f"{'add_' if adds else ''}{self.kind}_norm"

    @property
    def options(self) -> dict[str, Any]:
        options = {"eps": self.eps, "weight_offset": self.weight_offset, "rounding": self.rounding}
        return options | {"residual_dtype": self.residual_dtype, "out_dtype": self.out_dtype}

    def problem(self, **facts: Any) -> Problem:
        hidden = self.shape[-1:]
        shapes = {"x": self.shape, "residual": self.shape, "weight": hidden, "bias": hidden}
        operands = [
            None if getattr(self, name) is None else Operand(shape, getattr(self, name)) for name, shape in shapes.items()
        ]
        x = Operand(self.shape, self.x)
        return describe(
            self.spec,
            x,
            *operands[1:],
            returns_residual=self.function.startswith("add_"),
            residual_dtype=self.residual_dtype,
            out_dtype=self.out_dtype,
            **facts,
        )

    def arrays(self) -> dict[str, NumpyArray | None]:
        """Return x, residual, weight and bias, the same at every call, with dy and dresidual_out."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        problem = self.problem()

        def rows(dtype: str | None) -> NumpyArray | None:
            return _normal(rng, self.shape, dtype, self.mean, self.scale)

        hidden = self.shape[-1:]
        return {
            "x": rows(self.x),
            "residual": rows(self.residual),
            "weight": _normal(rng, hidden, self.weight, 0.0 if self.weight_offset else 1.0, 0.3),
            "bias": _normal(rng, hidden, self.bias, 0.0, 0.5),
            "dy": _normal(rng, self.shape, problem.out_dtype, 0.0, 1.0),
            "dresidual_out": _normal(rng, self.shape, problem.residual_out_dtype, 0.0, 1.0),
        }


def _normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str | None, mean: float, scale: float
) -> NumpyArray | None:
    if dtype is None:
        return None
    return (mean + scale * rng.standard_normal(shape)).astype(numpy_dtype(dtype))


_F32: dict[str, Any] = {"x": "float32", "residual": "float32", "weight": "float32"}
_F16: dict[str, Any] = {"x": "float16", "residual": "float16", "weight": "float16"}
_F64: dict[str, Any] = {"x": "float64", "residual": "float64", "weight": "float64"}
_BENCH = ("gpu", "bench")

MODELS = (
    Case("smollm2_135m", "rms", (2, 5, 576), tags=("ci", "gpu", "bench")),
    Case("llama_3_8b", "rms", (2, 4, 4096), tags=("ci", "gpu", "bench")),
    Case("llama_3_8b_first_block", "rms", (2, 4, 4096), residual=None),
    Case("llama_3_8b_hf", "rms", (3, 4096), rounding="hf"),
    Case("llama_3_70b_fp32_stream", "rms", (3, 8192), residual="float32"),
    Case("gemma_2_2b", "rms", (2, 3, 2304), eps=1e-6, weight_offset=1.0),
    Case("gemma_fp32_weight", "rms", (3, 2048), weight="float32", eps=1e-6, weight_offset=1.0),
    Case("qwen_3_qk_norm", "rms", (2, 7, 4, 128), residual=None, eps=1e-6),
    Case("t5_base", "rms", (5, 768), **_F32, eps=1e-6),
    Case("gpt_2", "layer", (2, 5, 768), **_F16, bias="float16"),
    Case("gpt_2_fp32", "layer", (2, 5, 768), **_F32, bias="float32"),
    Case("mpt_7b", "layer", (3, 4096), weight="bfloat16"),
    Case("vit_large", "layer", (2, 9, 1024), **_F32, bias="float32", eps=1e-6),
    Case("deepseek_v3", "rms", (4, 7168), eps=1e-6),
    Case("olmo_no_weight", "layer", (4, 2048), weight=None),
)

ODD = (
    Case("hidden_1", "rms", (5, 1), **_F32),
    Case("hidden_1_layer", "layer", (5, 1), **_F32, bias="float32"),
    Case("hidden_2", "layer", (7, 2), **_F32, bias="float32"),
    Case("hidden_3", "rms", (3, 3)),
    Case("hidden_31", "layer", (33, 31), bias="bfloat16"),
    Case("hidden_255", "rms", (4, 255), **_F16),
    Case("hidden_257", "layer", (4, 257), bias="bfloat16"),
    Case("hidden_1000", "rms", (9, 1000)),
    Case("hidden_1025", "layer", (2, 1025), **_F32),
    Case("hidden_4095", "rms", (2, 4095), **_F32),
    Case("one_dimension", "rms", (640,)),
    Case("one_dimension_layer", "layer", (640,), **_F32, bias="float32"),
    Case("no_rows", "rms", (0, 64)),
    Case("no_rows_layer", "layer", (3, 0, 64), bias="bfloat16"),
    Case("one_row", "layer", (1, 1024), bias="bfloat16"),
    Case("many_small_rows", "rms", (67, 64), **_F32),
    Case("four_dimensions", "layer", (2, 1, 3, 96), **_F32),
    Case("longer_than_a_backward_block", "rms", (3, 9000), **_F32),
    Case("longer_than_a_backward_block_layer", "layer", (3, 9000), bias="bfloat16"),
    Case("longer_than_a_block", "rms", (2, 40000), weight="float32"),
    Case("longer_than_a_block_layer", "layer", (2, 40001), **_F32, bias="float32"),
    Case("longer_than_a_block_stored", "layer", (2, 33000), rounding="stored", bias="bfloat16"),
)

OPTIONS = (
    Case("sum_bf16", "rms", (4, 512), rounding="sum"),
    Case("stored_bf16", "rms", (4, 512), rounding="stored"),
    Case("hf_bf16", "rms", (4, 512), rounding="hf"),
    Case("sum_layer_fp16", "layer", (4, 512), **_F16, bias="float16", rounding="sum"),
    Case("stored_layer_fp16", "layer", (4, 512), **_F16, bias="float16", rounding="stored"),
    Case("hf_layer_bf16", "layer", (4, 512), bias="bfloat16", rounding="hf"),
    Case("hf_fp32_weight", "rms", (4, 512), weight="float32", rounding="hf"),
    Case("hf_no_residual", "rms", (4, 512), residual=None, rounding="hf"),
    Case("residual_wider", "rms", (4, 384), residual="float32"),
    Case("residual_narrower", "rms", (4, 384), x="float32", residual="bfloat16", weight="float32"),
    Case("residual_other_half", "layer", (4, 384), x="float16", residual="bfloat16"),
    Case("residual_widened", "rms", (4, 384), residual_dtype="float32"),
    Case("residual_narrowed", "layer", (4, 384), **_F32, residual_dtype="bfloat16", rounding="stored"),
    Case("residual_started_in_fp32", "rms", (4, 384), residual=None, residual_dtype="float32"),
    Case("residual_started_narrow", "rms", (4, 384), x="float32", residual=None, residual_dtype="bfloat16"),
    Case("out_wider", "rms", (4, 384), out_dtype="float32"),
    Case("out_narrower", "layer", (4, 384), **_F32, bias="float32", out_dtype="float16"),
    Case("no_weight", "rms", (4, 384), weight=None),
    Case("bias_only", "layer", (4, 384), weight=None, bias="bfloat16"),
    Case("rms_with_bias", "rms", (4, 384), bias="float32"),
    Case("layer_with_offset", "layer", (4, 384), weight_offset=1.0),
    Case("fp64", "rms", (3, 100), **_F64),
    Case("fp64_layer", "layer", (3, 100), **_F64, bias="float64"),
    Case("eps_0", "rms", (4, 384), **_F32, eps=0.0),
    Case("eps_large", "rms", (4, 384), **_F32, eps=10.0),
    Case("tiny_values", "rms", (4, 384), **_F32, eps=1e-12, scale=1e-5),
    Case("mean_much_larger_than_deviation", "layer", (4, 4096), **_F32, bias="float32", mean=1e4),
    Case("mean_much_larger_long_row", "layer", (2, 40000), **_F32, mean=1e4),
)

DEVICE = (
    Case("llama_3_8b_prefill", "rms", (16384, 4096), tags=_BENCH),
    Case("llama_3_70b_prefill", "rms", (8192, 8192), tags=_BENCH),
    Case("gpt_2_batch", "layer", (65536, 768), bias="bfloat16", tags=_BENCH),
    Case("qk_norm_prefill", "rms", (8192, 32, 128), residual=None, tags=_BENCH),
    Case("hidden_16k", "rms", (4096, 16384), tags=_BENCH),
    Case("hidden_64k", "layer", (1024, 65536), tags=_BENCH),
    Case("hidden_1m", "rms", (64, 1048576), tags=_BENCH),
    Case("more_than_2_31_elements", "rms", (131073, 16384), residual=None, weight=None, tags=("gpu",)),
)

CASES = MODELS + ODD + OPTIONS + DEVICE


def tagged(tag: str) -> tuple[Case, ...]:
    """Return the cases with a tag."""
    return tuple(case for case in CASES if tag in case.tags)
