# SPDX-License-Identifier: Apache-2.0
"""The message that launches a kernel: every field read back by another decoder, every byte as jaxlib's plugin writes it."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest

pytest.importorskip("jax")

from normkit_jax import message

from .jax_gpu.decoder import Message, decode

KERNEL: dict[str, Any] = {
    "num_warps": 8,
    "shared": 1024,
    "ptx": ".version 8.0\n.target sm_90\n// a comment with \N{EM DASH} more than ASCII",
    "binary": bytes(range(256)),
    "compute_capability": 90,
}
PARAMETERS = [
    ("array", 16),
    ("i32", 0),
    ("i32", 1),
    ("i32", -1),
    ("i32", 2**31 - 1),
    ("i32", -(2**31)),
    ("i64", 0),
    ("i64", 127),
    ("i64", 128),
    ("i64", 2**40),
    ("i64", 2**63 - 1),
    ("i64", -(2**63)),
    ("array", 16),
    ("fp32", 0.0),
    ("fp32", 1e-5),
    ("fp32", -2.5),
]
GRIDS = [(1,), (132, 7), (2**31 - 1, 65535, 3)]


def encoded(parameters: list[tuple[str, float]], grid: tuple[int, ...] = (64,), **changes: Any) -> bytes:
    kernel = message.kernel("forward_rows", **KERNEL | changes)
    values = [message.array() if kind == "array" else message.scalar(value, kind) for kind, value in parameters]
    return message.launch("normkit_forward_rows", kernel, grid, values)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_field_is_read_back(grid: tuple[int, ...]) -> None:
    read = decode(encoded(PARAMETERS, grid))
    assert read.name == "normkit_forward_rows"
    assert read.grid == (*grid, 1, 1)[:3]
    assert [kind for kind, _ in read.parameters] == [kind for kind, _ in PARAMETERS]
    for (kind, actual), (_, expected) in zip(read.parameters, PARAMETERS, strict=True):
        assert actual == (struct.unpack("f", struct.pack("f", expected))[0] if kind == "fp32" else expected)
    assert read.kernel.name == read.kernel.image_name == "forward_rows"
    assert read.kernel.num_warps == 8
    assert read.kernel.shared == read.kernel.image_shared == 1024
    assert read.kernel.ptx == KERNEL["ptx"]
    assert read.kernel.compute_capability == 90
    assert read.kernel.num_ctas == 1
    assert read.kernel.binary == KERNEL["binary"]


def test_fields_that_are_zero_or_empty_are_left_out() -> None:
    read = decode(encoded([], shared=0, ptx="", compute_capability=0))
    assert (read.kernel.shared, read.kernel.image_shared, read.kernel.ptx, read.kernel.compute_capability) == (0, 0, "", 0)
    assert read.parameters == []


def test_a_scalar_that_is_zero_is_written() -> None:
    """It is one of several alternatives: without it jaxlib would read a parameter of no kind."""
    assert message.scalar(0, "i32") == bytes([3 << 3, 0])
    assert message.scalar(0, "i64") == bytes([5 << 3, 0])
    assert message.scalar(0.0, "fp32") == bytes([7 << 3 | 5, 0, 0, 0, 0])


def test_a_negative_number_takes_ten_bytes() -> None:
    """A signed 32-bit field is extended to 64 bits, as protocol buffers have it."""
    assert message.scalar(-1, "i32") == bytes([3 << 3, *[0xFF] * 9, 1])


@pytest.mark.parametrize("kind", ["fp64", "u32", "bf16"])
def test_a_kind_of_scalar_that_no_kernel_has_is_refused(kind: str) -> None:
    with pytest.raises(KeyError):
        message.scalar(1, kind)


def test_the_same_launch_gives_the_same_bytes() -> None:
    assert encoded(PARAMETERS) == encoded(PARAMETERS)
    assert encoded(PARAMETERS) != encoded(PARAMETERS, (65,))


def plugin() -> Any:
    """Return jaxlib's module of message classes, which imports without them where no plugin is installed."""
    gpu_triton = pytest.importorskip("jaxlib.gpu_triton")
    if not hasattr(gpu_triton, "TritonKernelCall"):
        pytest.skip("the CUDA plugin of jaxlib is not installed; tests/test_jax_versions.py runs this where it is")
    return gpu_triton


def written_by_plugin(parameters: list[tuple[str, float]], grid: tuple[int, ...], changes: dict[str, Any]) -> Any:
    classes, fields = plugin(), KERNEL | changes
    kernel = classes.TritonKernel(
        "forward_rows", fields["num_warps"], 1, fields["shared"], fields["ptx"], "", fields["compute_capability"]
    )
    values = [
        # its arrays take the number of bytes to clear first, then the divisibility
        classes.create_array_parameter(0, value) if kind == "array" else classes.create_scalar_parameter(value, kind)
        for kind, value in parameters
    ]
    return classes.TritonKernelCall(kernel, *(*grid, 1, 1)[:3], values).to_proto("normkit_forward_rows", b"")


@pytest.mark.parametrize("changes", [{}, {"shared": 0}, {"ptx": "x" * 100_000}], ids=["plain", "no_shared", "long"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_byte_is_as_the_plugin_writes_it(grid: tuple[int, ...], changes: dict[str, Any]) -> None:
    """The plugin's classes cannot write a module image, so it is cut out of our message first."""
    expected = written_by_plugin(PARAMETERS, grid, changes)
    assert zlib.decompress(without_image(encoded(PARAMETERS, grid, **changes))) == expected


@pytest.mark.parametrize("parameter", PARAMETERS, ids=str)
def test_each_parameter_is_as_the_plugin_writes_it(parameter: tuple[str, float]) -> None:
    assert zlib.decompress(without_image(encoded([parameter]))) == written_by_plugin([parameter], (64,), {})


def without_image(opaque: bytes) -> bytes:
    """Encode a message again, without its module image."""
    read: Message = decode(opaque)
    original = message._MODULE_IMAGE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message, "_bytes", lambda field, content: b"" if field == original else _bytes(field, content))
        changes = {"shared": read.kernel.shared, "ptx": read.kernel.ptx}
        return encoded(read.parameters, read.grid, **changes)


_bytes = message._bytes
