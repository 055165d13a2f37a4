"""The only place that knows the bus's format: MessagePack for messages, JSON for bucket records."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_encode_msgpack = msgspec.msgpack.Encoder().encode
_encode_json = msgspec.json.Encoder().encode


class DecodeError(Exception):
    """Bytes that are not the message they should be; `data` keeps their head."""

    def __init__(self, kind: type[Any], data: bytes, cause: str) -> None:
        self.kind, self.data = kind, data[:256]
        super().__init__(f"not a {kind.__name__} ({len(data)} bytes): {cause}")


# Building a decoder costs a hundred times what decoding does.
_msgpack_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}
_json_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def encode(message: msgspec.Struct) -> bytes:
    """A message as MessagePack."""
    return _encode_msgpack(message)


def decode(kind: type[T], data: bytes) -> T:
    """Raises DecodeError for anything that is not a `kind`, too deep nesting included."""
    decoder = _msgpack_decoders.get(kind) or _msgpack_decoders.setdefault(kind, msgspec.msgpack.Decoder(kind))
    try:
        message: T = decoder.decode(data)
        return message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise DecodeError(kind, data, str(exc)) from exc


def encode_record(record: Any) -> bytes:
    """A bucket record as JSON, readable with any NATS tool."""
    return _encode_json(record)


def decode_record(kind: type[T], data: bytes) -> T:
    """Raises DecodeError for anything that is not a `kind`."""
    decoder = _json_decoders.get(kind) or _json_decoders.setdefault(kind, msgspec.json.Decoder(kind))
    try:
        record: T = decoder.decode(data)
        return record
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise DecodeError(kind, data, str(exc)) from exc
