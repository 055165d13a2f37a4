"""Decoding takes anything from anybody: a message comes out, or a DecodeError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.common.codec import DecodeError, decode, decode_record, encode, encode_record
from penstock.common.messages import Heartbeat, LoadReport
from penstock.common.model import Endpoint, Instance

INSTANCE = Instance(id="a", endpoint=Endpoint("10.0.0.1", 8000))


@pytest.mark.parametrize(
    ("decoder", "kind", "data"),
    [
        (decode, LoadReport, b""),
        (decode, LoadReport, b"\xc1"),
        (decode, LoadReport, b"\x91" * 1_000_000),
        (decode, Heartbeat, b"\x81\xa1x" * 1_000_000),
        (decode, LoadReport, b"\x94\xa1a\xa1b\x01" + b"\x91" * 1_000_000),
        (decode, Heartbeat, b"\x81\xa7unknown" + b"\x91" * 1_000_000),
        (decode, LoadReport, b"\x98\xa1a\xa1b\x01\x90\x90\x00\x00\xc2" + b"\x91" * 1_000_000),
        (decode, LoadReport, b"\xdd\xff\xff\xff\xff"),
        (decode, LoadReport, b"\x93\xa2\xff\xfe\xa1b\x01"),
        (decode, LoadReport, encode(LoadReport("a", "b", 1)) + b"\x00"),
        (decode_record, Instance, b""),
        (decode_record, Instance, b"[" * 1_000_000),
        (decode_record, Instance, b'{"unknown":' + b"[" * 1_000_000),
        (decode_record, Instance, b'{"id": "\xff"}'),
        (decode_record, Instance, b'{"id": "\\ud800"}'),
        (decode_record, Instance, b'{"id": "a", "endpoint": {"host": "h", "port": 1e400}}'),
        (decode_record, Instance, b'{"id": "a", "endpoint": {"host": "h", "port": ' + b"9" * 10_000 + b"}}"),
        (decode_record, Instance, encode_record(INSTANCE) + b"{}"),
    ],
)
def test_what_is_no_message_is_a_decode_error(
    decoder: Callable[[type[Any], bytes], Any], kind: type[Any], data: bytes
) -> None:
    with pytest.raises(DecodeError) as caught:
        decoder(kind, data)
    assert kind.__name__ in str(caught.value)
    assert f"{len(data)} bytes" in str(caught.value)
    assert caught.value.data == data[:256]


def test_a_record_is_json_that_any_tool_can_read() -> None:
    assert msgspec.json.decode(encode_record(INSTANCE))["endpoint"] == {
        "host": "10.0.0.1",
        "port": 8000,
        "scheme": "http",
    }


def test_unknown_fields_of_a_record_are_ignored() -> None:
    data = msgspec.json.encode({**msgspec.to_builtins(INSTANCE), "added_later": {"deep": [1, 2]}})
    assert decode_record(Instance, data) == INSTANCE
