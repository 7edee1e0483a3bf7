# SPDX-License-Identifier: Apache-2.0
"""A reader of the message that launches a Triton kernel from XLA, written apart from normkit_jax.message.

The field numbers are those of jaxlib/gpu/triton.proto (openxla/jax, Apache-2.0), the wire format that of protocol buffers.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """TritonKernel, with its TritonModuleImage."""

    name: str
    num_warps: int
    shared: int
    ptx: str
    compute_capability: int
    num_ctas: int
    binary: bytes
    image_name: str
    image_shared: int


class Message(NamedTuple):
    """TritonAnyKernelCall. A parameter is its kind and its value: the divisibility of an array, the number of a scalar."""

    name: str
    grid: tuple[int, int, int]
    parameters: list[tuple[str, float]]
    kernel: Kernel

    @property
    def arrays(self) -> int:
        """How many parameters are buffers."""
        return [kind for kind, _ in self.parameters].count("array")


def decode(opaque: bytes) -> Message:
    """Decode a whole message; a field that stands nowhere below is an error."""
    call, name, *_ = _fields(zlib.decompress(opaque), {1: b"", 4: b""})
    kernel, *grid, parameters = _fields(call, {1: b"", 2: 0, 3: 0, 4: 0, 5: []})
    return Message(name.decode(), tuple(grid), [_parameter(parameter) for parameter in parameters], _kernel(kernel))


def messages(lowered: str) -> list[tuple[Message, str]]:
    """Return the message of each custom call in the text of a lowered module, in order, with the line that has it."""
    found = []
    for line in lowered.splitlines():
        if "custom_call @triton_kernel_call_ffi" in line:
            opaque = re.search(r'opaque = "((?:[^"\\]|\\.)*)"', line)
            assert opaque, line
            found.append((decode(_unescaped(opaque[1])), line))
    return found


def _kernel(content: bytes) -> Kernel:
    name, warps, shared, ptx, capability, ctas, image = _fields(content, {1: b"", 2: 0, 3: 0, 4: b"", 6: 0, 10: 0, 11: b""})
    binary, image_name, image_shared = _fields(image, {1: b"", 2: b"", 3: 0})
    return Kernel(name.decode(), warps, shared, ptx.decode(), capability, ctas, binary, image_name.decode(), image_shared)


def _parameter(content: bytes) -> tuple[str, float]:
    ((field, value),) = list(_entries(content))
    if field == 1:
        zeroed, divisibility = _fields(value, {1: 0, 2: 0})
        assert not zeroed
        return "array", divisibility
    if field == 7:
        return "fp32", struct.unpack("<f", value)[0]
    return {3: "i32", 5: "i64"}[field], value - (1 << 64) if value >> 63 else value


def _fields(content: bytes, defaults: dict[int, Any]) -> list[Any]:
    """Return the value of each field; a field whose default is a list may stand several times."""
    values = {field: list(default) if isinstance(default, list) else default for field, default in defaults.items()}
    seen = set()
    for field, value in _entries(content):
        if isinstance(values[field], list):
            values[field].append(value)
            continue
        assert field not in seen, f"field {field} stands twice"
        seen.add(field)
        values[field] = value
    return list(values.values())


def _entries(content: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(content):
        tag, position = _varint(content, position)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(content, position)
            yield field, value
            continue
        size = 4
        if wire_type != 5:
            assert wire_type == 2, f"wire type {wire_type}"
            size, position = _varint(content, position)
        assert position + size <= len(content), "the content ends within a field"
        yield field, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[position]
        number |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            assert shift <= 70, "a varint has at most ten bytes"
            return number, position


def _unescaped(text: str) -> bytes:
    """Undo the escapes of an MLIR string: a backslash with two hexadecimal digits, or with the character itself."""

    def character(escape: re.Match[bytes]) -> bytes:
        code = escape[1]
        return bytes([int(code, 16)]) if len(code) == 2 else code

    return re.sub(rb"\\([0-9A-Fa-f]{2}|.)", character, text.encode())
