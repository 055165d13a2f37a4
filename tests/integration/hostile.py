"""What a hostile member of the bus may send: bytes that are no message, messages of hostile values."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from integration.bus_users import UserServer

KIB = 1024
# NATS's default; what is over a subject's own bound and below this reaches the subscribers.
PAYLOAD_LIMIT = 1024 * KIB
EVIL_TEXT = 'a"\r\nx-evil: 1\r\n\r\n\x00\x1b[31m\u2028<script>{}%n'

HOSTILE_VALUES: dict[str, Any] = {
    "nil": None,
    "true": True,
    "minus one": -1,
    "2**63": 2**63,
    "2**64 - 1": 2**64 - 1,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "1e308": 1e308,
    "-0.5": -0.5,
    "no text": "",
    "control characters": EVIL_TEXT,
    "wildcard": "*",
    "tail wildcard": ">",
    "dots": "a..b.",
    "path": "../../../etc/passwd",
    "128 characters": "x" * 128,
    "512 characters": "x" * 512,
    "64 KiB of text": "x" * 64 * KIB,
    "no bytes": b"",
    "7 bytes": b"\xff" * 7,
    "too many hashes": b"\0" * (2049 * 8),
    "empty list": [],
    "empty map": {},
    "deep list": json.loads("[" * 200 + "]" * 200),
    "many": ["x"] * 5000,
    "extension": msgspec.msgpack.Ext(5, b"x" * 16),
}


def garbage(bound: int) -> dict[str, bytes]:
    """Bytes that no subject of this bound takes for a message."""
    dice = random.Random(7)
    return {
        "empty": b"",
        **{f"random {n}": dice.randbytes(n) for n in (1, 2, 16, 255, 4000)},
        "nil": b"\xc0",
        "number": b"\x2a",
        "text": b"\xa5hello",
        "never used byte": b"\xc1",
        "empty list": b"\x90",
        "empty map": b"\x80",
        "JSON": b'{"a": [1, 2, 3]}',
        "list of 2**32 - 1": b"\xdd\xff\xff\xff\xff",
        "map of 2**32 - 1": b"\xdf\xff\xff\xff\xff",
        "text of 4 GiB": b"\xdb\xff\xff\xff\xff" + b"x" * 100,
        "bytes of 4 GiB": b"\xc6\xff\xff\xff\xff",
        "deep lists": b"\x91" * min(100_000, bound - 1),
        "deep maps": b"\x81\xa1a" * 1000,
        "not UTF-8": b"\x95\xa2\xff\xfe\xa2\xc3\x28",
        "as large as allowed": b"\x91\xda" + bytes(bound - 2),
        "over the bound": b"\x90" * (bound + 1),
        "as large as NATS takes": b"\xa5hello" + bytes(PAYLOAD_LIMIT - 6),
    }


def mutations(message: msgspec.Struct) -> Iterator[tuple[str, bytes]]:
    """A valid message with one value replaced by each hostile one, one field more, one less, and cut."""
    encoded = msgspec.msgpack.encode(message)
    plain = msgspec.msgpack.decode(encoded)
    for path in paths(plain):
        for name, value in HOSTILE_VALUES.items():
            yield f"{path}: {name}", msgspec.msgpack.encode(replaced(plain, path, value))
    for length in range(len(encoded)):
        yield f"the first {length} bytes", encoded[:length]
    yield "followed by more", encoded + encoded


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands within `value`."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """`value` with `other` at `path`."""
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], other)
    return copy


class Attacker:
    """A member of the bus that writes whatever bytes it likes into the protocol."""

    def __init__(self, users: UserServer, user: str) -> None:
        self._users, self._user = users, user
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        port, password = self._users.server.port, self._users.passwords[self._user]
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        options = {"user": self._user, "pass": password, "headers": True, "no_responders": True}
        self._writer.write(b"CONNECT " + json.dumps({**options, "verbose": False}).encode() + b"\r\n")
        await self.settle()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    def publish(self, subject: str | bytes, payload: bytes, reply: bytes = b"", block: bytes = b"") -> None:
        """`block` are the headers as they stand on the wire."""
        where = (subject if isinstance(subject, bytes) else subject.encode()) + (reply and b" " + reply)
        sizes = b"%d %d" % (len(block), len(block) + len(payload)) if block else b"%d" % len(payload)
        self._writer.write(
            b"%b %b %b\r\n%b%b\r\n" % (b"HPUB" if block else b"PUB", where, sizes, block, payload)
        )

    async def settle(self) -> list[bytes]:
        """Return once the server has taken everything: what it complained of."""
        self._writer.write(b"PING\r\n")
        complaints = []
        while (line := await self._reader.readline()) != b"PONG\r\n":
            if not line:
                raise ConnectionError("the server closed the attacker's connection")
            if line.startswith(b"-ERR"):
                complaints.append(line)
        return complaints


@asynccontextmanager
async def attacker(users: UserServer, user: str) -> AsyncIterator[Attacker]:
    """Connected as `user`."""
    hostile = Attacker(users, user)
    await hostile.open()
    try:
        yield hostile
    finally:
        await hostile.close()
