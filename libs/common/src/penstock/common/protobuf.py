"""As much of the protobuf wire format as instance records need, read strictly.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_FIELD = 2**29 - 1


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) in the order of the message: numbers as signed 64 bits, else bytes.

    Raises:
        ValueError: not a message; groups, which proto3 does not have, are none.
    """
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _MAX_FIELD:
            raise ValueError(f"a field has the number {number}")
        if kind == VARINT:
            value, at = _read_varint(data, at)
            yield number, value - 2**64 if value >= 2**63 else value
            continue
        if kind == BYTES:
            size_bytes, at = _read_varint(data, at)
        elif kind in _FIXED_BYTES:
            size_bytes = _FIXED_BYTES[kind]
        else:
            raise ValueError(f"field {number} has the wire type {kind}")
        if size_bytes > len(data) - at:
            raise ValueError(f"field {number} goes past the end")
        yield number, data[at : at + size_bytes]
        at += size_bytes


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for position, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            if value >= 2**64:
                raise ValueError("a number has more than 64 bits")
            return value, at + position + 1
    raise ValueError("a number does not end")


def write_field(number: int, value: int | str | bytes) -> bytes:
    """One field; a value that is its type's default is left out, as proto3 does."""
    if not value:
        return b""
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value % 2**64)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
