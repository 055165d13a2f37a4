"""The NATS protocol as hostile publishers can make the server write it: a message stays where it belongs."""

from __future__ import annotations

import pytest

from penstock.common.adapters.nats_wire import Message, Parser, WireError, encode_publish, parse_headers


def read(*pieces: bytes) -> list[tuple[int, str, str, bytes]]:
    """Messages as (subscription, subject, reply, data)."""
    messages: list[tuple[int, str, str, bytes]] = []

    def take(sid: int, message: Message) -> None:
        messages.append((sid, message.subject, message.reply, message.data))

    parser = Parser(take, lambda name, rest: None)
    for piece in pieces:
        parser.feed(piece)
    return messages


@pytest.mark.parametrize("space", [b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xa0", b"\r", b"\x00"])
def test_white_space_within_a_subject_does_not_name_another_subscription(space: bytes) -> None:
    ((sid, subject, reply, data),) = read(b"MSG a" + space + b"7 5 2\r\nhi\r\n")
    assert (sid, reply, data) == (5, "", b"hi")
    assert subject.startswith("a")
    assert subject.endswith("7")


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        (b"MSG a 5 r 2", "r"),
        (b"MSG a 5 r\x0b9 2", "r\x0b9"),
        (b"MSG a 5 \xff\xfe 2", ""),
        (b"MSG \xff 5 r 2", "r"),
        (b"HMSG a 5 r 0 2", "r"),
    ],
)
def test_a_reply_address_that_is_no_text_is_none(line: bytes, reply: str) -> None:
    ((sid, _, heard, data),) = read(line + b"\r\nhi\r\n")
    assert (sid, heard, data) == (5, reply, b"hi")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_messages_are_the_same_in_pieces_of_any_size(size: int) -> None:
    wire = b"MSG a 1 4\r\n\r\n\r\n\r\nHMSG b 2 r 12 14\r\nNATS/1.0\r\n\r\nhi\r\nMSG c 3 0\r\n\r\n"
    whole = read(wire)
    assert [(sid, data) for sid, _, _, data in whole] == [(1, b"\r\n\r\n"), (2, b"hi"), (3, b"")]
    assert read(*(wire[i : i + size] for i in range(0, len(wire), size))) == whole


@pytest.mark.parametrize(
    "wire",
    [
        b"MSG a\r\n",
        b"MSG a b c d e 1\r\n",
        b"MSG a 1 -2\r\n",
        b"MSG a x 2\r\nhi\r\n",
        b"MSG a 1 99999999999999\r\n",
        b"MSG a 1 2\r\nhiho\r\n",
        b"HMSG a 1 5 2\r\nhi\r\n",
        b"x" * 100_000,
    ],
)
def test_bytes_that_are_not_the_protocol_are_an_error(wire: bytes) -> None:
    with pytest.raises(WireError):
        read(wire)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", {}),
        (b"NATS/1.0", {}),
        (b"\r\n\r\n", {}),
        (b"NATS/1.0\r\n\r\n", {}),
        (b"NATS/1.0\r\na: b\r\n a : c\r\nnone\r\n\r\n", {"a": "c"}),
        (b"NATS/1.0 404 Not Found\r\n\r\n", {"Status": "404", "Description": "Not Found"}),
        (b"NATS/1.0\r\n\xff: \xfe\r\n\r\n", {"\ufffd": "\ufffd"}),
    ],
)
def test_any_header_block_is_read_without_a_fault(raw: bytes, expected: dict[str, str]) -> None:
    assert parse_headers(raw) == expected


@pytest.mark.parametrize(
    ("subject", "reply", "headers"),
    [
        ("", "", {}),
        ("a b", "", {}),
        ("a\r\nPUB b 0\r\n", "", {}),
        ("a\x0bb", "", {}),
        ("a", "r s", {}),
        ("a", "r\r\n", {}),
        ("a", "", {"name": "v\r\nother: 1"}),
        ("a", "", {"na\r\nme": "v"}),
        ("a", "", {"na:me": "v"}),
    ],
)
def test_nothing_written_can_end_its_line_early(subject: str, reply: str, headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not a"):
        encode_publish(subject, b"", reply, headers)
