# SPDX-License-Identifier: Apache-2.0
"""The message that launches a Triton kernel from XLA: the operand `opaque` of the custom call `triton_kernel_call_ffi`.

jaxlib registers that call when its CUDA or ROCm plugin is installed, and reads from it a zlib-compressed protocol buffer,
`jax_triton.TritonAnyKernelCall` of jaxlib/gpu/triton.proto (openxla/jax, Apache-2.0), whose field numbers stand below.
Written by hand because the plugin's own classes exist only where the plugin is installed, and lowering needs none.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

# Wire types of the protocol buffer encoding.
_VARINT, _LENGTH, _FIXED32 = 0, 2, 5

_KERNEL_CALL, _NAME = 1, 4  # TritonAnyKernelCall: kernel_call, name
_KERNEL, _GRID, _PARAMETERS = 1, (2, 3, 4), 5  # TritonKernelCall: kernel, grid_0 to grid_2, parameters
_ARRAY, _SCALAR = 1, {"i32": 3, "i64": 5, "fp32": 7}  # Parameter: array, or one of the scalar types
_DIVISIBILITY = 2  # Parameter.Array: ptr_divisibility
_KERNEL_NAME, _NUM_WARPS, _SHARED, _PTX, _CAPABILITY, _NUM_CTAS = 1, 2, 3, 4, 6, 10  # TritonKernel
_MODULE_IMAGE = 11  # TritonKernel: module_image, read by jaxlib 0.11.1 and newer, passed over by older ones
_OBJECT_FILE, _IMAGE_KERNEL_NAME, _IMAGE_SHARED = 1, 2, 3  # TritonModuleImage


def kernel(name: str, *, num_warps: int, shared: int, ptx: str, binary: bytes, compute_capability: int) -> bytes:
    """Encode a TritonKernel.

    Args:
        name: symbol of the kernel, in the PTX and in the binary.
        num_warps: warps per program.
        shared: bytes of dynamic shared memory per program.
        ptx: assembly, for jaxlib older than 0.11.1; empty for ROCm.
        binary: cubin or hsaco.
        compute_capability: 90 for sm_90; 0 for ROCm.
    """
    image = _bytes(_OBJECT_FILE, binary) + _bytes(_IMAGE_KERNEL_NAME, name.encode()) + _integer(_IMAGE_SHARED, shared)
    return b"".join(
        (
            _bytes(_KERNEL_NAME, name.encode()),
            _integer(_NUM_WARPS, num_warps),
            _integer(_SHARED, shared),
            _bytes(_PTX, ptx.encode()),
            _integer(_CAPABILITY, compute_capability),
            _integer(_NUM_CTAS, 1),
            _bytes(_MODULE_IMAGE, image),
        )
    )


def array() -> bytes:
    """Encode a parameter that is a buffer, aligned to 16 bytes; buffers are taken in order, operands before results."""
    return _bytes(_ARRAY, _integer(_DIVISIBILITY, 16))


def scalar(value: float, kind: str) -> bytes:
    """Encode a parameter that is a number; kind is Triton's name of its type: "i32", "i64" or "fp32"."""
    if kind == "fp32":
        return _tag(_SCALAR[kind], _FIXED32) + struct.pack("<f", value)
    # one of several alternatives, so written also where it is 0
    return _tag(_SCALAR[kind], _VARINT) + _varint(int(value))


def launch(name: str, kernel: bytes, grid: Sequence[int], parameters: Iterable[bytes]) -> bytes:
    """Encode and compress the whole message.

    Args:
        name: what profilers show.
        kernel: a TritonKernel.
        grid: programs along one to three axes.
        parameters: one for each run-time argument of the kernel, in order.
    """
    sizes = (*grid, 1, 1)[:3]
    call = _bytes(_KERNEL, kernel) + b"".join(_integer(field, size) for field, size in zip(_GRID, sizes, strict=True))
    call += b"".join(_bytes(_PARAMETERS, parameter) for parameter in parameters)
    return zlib.compress(_bytes(_KERNEL_CALL, call) + _bytes(_NAME, name.encode()))


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _integer(field: int, number: int) -> bytes:
    """Encode a number; the encoding leaves out zeros."""
    return _tag(field, _VARINT) + _varint(number) if number else b""


def _bytes(field: int, content: bytes) -> bytes:
    """Encode text, bytes or a message; the encoding leaves out empty ones."""
    return _tag(field, _LENGTH) + _varint(len(content)) + content if content else b""
