# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel's machine code says: spills, memory accesses and their widths, parameters."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from normkit.arrays import numpy_dtype
from normkit.compile import CompiledKernel, compile_step
from normkit.plan import Step

# The largest shared memory of one program, in bytes: NVIDIA's compute capability tables (what a kernel may opt in to), AMD's
# instruction set manuals (LDS of one workgroup).
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b")
_PTX_PARAMETER = re.compile(r"\.param \.([busf]\d+)")
_PTX_TYPES = {"i32": "u32", "fp32": "f32"}
_GCN_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_GCN_SIZES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


class Accesses(NamedTuple):
    """Accesses to global memory that one thread is compiled to make: bytes moved 16 or more at a time, and narrower ones."""

    wide_bytes: int
    narrow: int


class Measured(NamedTuple):
    """One kernel's machine code in numbers. `spilled` counts bytes, or values, kept in memory for want of registers: because a
    program may not have more of them, or because the assembler would rather run more programs at once."""

    spilled: int
    registers: int
    load: Accesses
    store: Accesses
    shared: int
    parameters: list[str]
    expected_parameters: list[str]


def measure(step: Step, dtypes: Mapping[str, str | None], arch: str) -> Measured:
    """Compile one step and measure it."""
    kernel = compile_step(step, dtypes, arch)
    spilled, registers = _spilled(kernel)
    load, store = accesses(kernel.arch, kernel.assembly)
    assert kernel.num_warps == step.num_warps
    assert kernel.arch == arch
    if arch.startswith("gfx"):
        return Measured(spilled, registers, load, store, kernel.shared, [], [])
    entry = _only(rf"\.entry {kernel.name}\((.*?)\)", kernel.assembly)
    # the last two are Triton's own, for scratch memory
    expected = [_PTX_TYPES.get(kind, "u64") for kind in kernel.arguments.values()] + ["u64", "u64"]
    given = [kind if kind != "b32" else "f32" for kind in _PTX_PARAMETER.findall(entry)]
    return Measured(spilled, registers, load, store, kernel.shared, given, expected)


def accesses(arch: str, assembly: str) -> tuple[Accesses, Accesses]:
    """Return the loads and the stores of a kernel, from its assembly."""
    sizes: dict[str, list[int]] = {"load": [], "store": []}
    if arch.startswith("sm_"):
        for kind, vector, bits in _PTX_ACCESS.findall(assembly):
            sizes["load" if kind == "ld" else "store"].append(int(vector or 1) * int(bits) // 8)
    else:
        for kind, suffix in _GCN_ACCESS.findall(assembly):
            sizes[kind].append(_GCN_SIZES[re.sub(r"_d16(_hi)?$", "", suffix)])
    load, store = (
        Accesses(sum(size for size in found if size >= 16), sum(size < 16 for size in found)) for found in sizes.values()
    )
    return load, store


def _spilled(kernel: CompiledKernel) -> tuple[int, int]:
    if kernel.arch.startswith("gfx"):
        names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers = int(_only(r"\.vgpr_count:\s*(\d+)", kernel.assembly))
        return sum(int(_only(rf"\.{name}:\s*(\d+)", kernel.assembly)) for name in names), registers
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (
        int(_only(rf"\b{name}:(\d+)", usage.stdout + usage.stderr)) for name in ("REG", "STACK", "LOCAL")
    )
    return stack + local, registers


def row_bytes(step: Step, dtypes: Mapping[str, str | None]) -> dict[str, int]:
    """Return the bytes of rows that a program loads and stores, counted once for each place in the kernel's source."""
    again, back = (2 if step.constants.get("AGAIN") else 1), step.constants.get("READ_BACK")
    with_dh = bool(dtypes.get("dx") or dtypes.get("dresidual"))
    places: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "forward_rows": (("x", "residual") * again, ("y", "residual_out")),
        "forward_long": (("x", "residual", *(("residual_out",) if back else ("x", "residual"))), ("y", "residual_out")),
        "backward_rows": (("dy", "h") + ("dresidual_out",) * with_dh, ("dx", "dresidual")),
        "backward_twice": (("dy", "h") + ("dresidual_out",) * with_dh, ("dx", "dresidual")),
        "backward_long": (("dy", "h", "dresidual_out"), ("dx", "dresidual")),
        "backward_columns": (("dy", "h"), ()),
        "sum_partials": (("partial",), ()),
    }
    # of a block wider than the row, the compiler leaves out what is masked in every thread
    columns = min(int(step.constants["BLOCK_N"]) * int(step.constants.get("PIECES", 1)), int(step.constants["HIDDEN"]))
    rows = int(step.constants.get("BLOCK_M", 1))
    loaded, stored = places[step.kernel]

    def total(names: tuple[str, ...]) -> int:
        return sum(rows * columns * numpy_dtype(dtype).itemsize for dtype in map(dtypes.get, names) if dtype is not None)

    # the first look takes two pieces at a time, in a loop
    looped = total(("dy", "h")) * 2 // int(step.constants["PIECES"]) if with_dh and step.kernel == "backward_twice" else 0
    return {"load": total(loaded) + looped, "store": total(stored)}


def _only(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.DOTALL)
    return str(found)
