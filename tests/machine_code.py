# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel's machine code says: spills, memory accesses and their widths, parameters."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from normkit.compile import CompiledKernel
from normkit.plan import Step

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The largest shared memory of one program, in bytes: NVIDIA's compute capability tables (what a kernel may opt in to), AMD's
# instruction set manuals (LDS of one workgroup).
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536, "gfx950": 163_840}
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b")
_PTX_PARAMETER = re.compile(r"\.param \.([busf]\d+)")
_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
_GCN_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_GCN_SIZES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


class Accesses(NamedTuple):
    """Accesses to global memory that one thread is compiled to make: bytes moved 16 or more at a time, and narrower ones."""

    wide_bytes: int
    narrow: int


def accesses(kernel: CompiledKernel) -> dict[str, Accesses]:
    """Return the "load" and the "store" accesses of a kernel."""
    sizes: dict[str, list[int]] = {"load": [], "store": []}
    if kernel.arch.startswith("sm_"):
        for kind, vector, bits in _PTX_ACCESS.findall(kernel.assembly):
            sizes["load" if kind == "ld" else "store"].append(int(vector or 1) * int(bits) // 8)
    else:
        for kind, suffix in _GCN_ACCESS.findall(kernel.assembly):
            sizes[kind].append(_GCN_SIZES[re.sub(r"_d16(_hi)?$", "", suffix)])
    wide = {kind: sum(size for size in found if size >= 16) for kind, found in sizes.items()}
    return {kind: Accesses(wide[kind], sum(size < 16 for size in found)) for kind, found in sizes.items()}


def spills(kernel: CompiledKernel) -> dict[str, int]:
    """Return each number that says that registers did not suffice; all are 0 in a kernel that does not spill."""
    if kernel.arch.startswith("gfx"):
        names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        return {name: int(_only(rf"\.{name}:\s*(\d+)", kernel.assembly)) for name in names}
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(_only(rf"\b{name}:(\d+)", usage.stdout + usage.stderr)) for name in ("STACK", "LOCAL")}


def parameters(kernel: CompiledKernel) -> list[str]:
    """Return the types of an NVIDIA kernel's parameters: u64, u32, f32."""
    entry = _only(rf"\.entry {kernel.name}\((.*?)\)", kernel.assembly)
    return [kind.replace("b", "u") if kind != "b32" else "f32" for kind in _PTX_PARAMETER.findall(entry)]


def expected_parameters(kernel: CompiledKernel) -> list[str]:
    """Return the same as a record's arguments say; the two last are Triton's own, for scratch memory."""
    return [_PTX_TYPES.get(kind, "u64") for kind in kernel.arguments.values()] + ["u64", "u64"]


def block_bytes(step: Step, dtypes: dict[str, str | None]) -> dict[str, int]:
    """Return the bytes of one block's rows that a program loads and stores, once for each place in the kernel's source."""
    places = {
        "forward_rows": (("x", "residual"), ("y", "residual_out")),
        "forward_long": (("x", "residual") * 2, ("y", "residual_out")),
        "backward_rows": (("dy", "h", "dresidual_out"), ("dx", "dresidual")),
        "backward_long": (("dy", "h") * 2 + ("dresidual_out",), ("dx", "dresidual")),
        "backward_columns": (("dy", "h"), ()),
        "sum_partials": (("partial",), ()),
    }
    loaded, stored = places[step.kernel]
    if step.kernel == "backward_rows" and not (dtypes["dx"] or dtypes["dresidual"]):
        loaded = ("dy", "h")
    # of a block wider than the row, the compiler leaves out what is masked in every thread
    columns = min(int(step.constants["BLOCK_N"]), int(step.constants["HIDDEN"]))
    elements = int(step.constants.get("BLOCK_M", 1)) * columns

    def total(names: tuple[str, ...]) -> int:
        return sum(elements * ITEM_SIZES[dtype] for dtype in map(dtypes.get, names) if dtype is not None)

    return {"load": total(loaded), "store": total(stored)}


def _only(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.DOTALL)
    return str(found)
