"""The connection to Redis: what it says first, and that no answer is taken for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from integration.limit_labs import asked

from penstock.ingress.adapters.limit_store import PREFIX, RedisLimitStore
from penstock.ingress.adapters.redis_connection import MAX_REPLY_BYTES, command
from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.limits import MINUTE_S, REQUESTS, Part
from penstock.ingress.ports import StoreLost

CLAIM = [Part("k", MINUTE_S, 1, 10, REQUESTS, "user")]
Answer = Callable[[list[bytes]], bytes]


def bulk(*numbers: int) -> bytes:
    data = msgspec.msgpack.encode(numbers)
    return b"$%d\r\n%b\r\n" % (len(data), data)


GRANTED = bulk(1_700_000_040, 500_000, -1, 3)


async def read_command(reader: asyncio.StreamReader) -> list[bytes]:
    words = []
    for _ in range(int((await reader.readline())[1:])):
        size = int((await reader.readline())[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


@asynccontextmanager
async def redis(answer: Answer, **settings: str) -> AsyncIterator[tuple[RedisLimitStore, list[list[bytes]]]]:
    """A store whose Redis answers so, byte by byte, and the commands that came."""
    heard: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                heard.append(words := await read_command(reader))
                for byte in answer(words) or b"+OK\r\n":
                    writer.write(bytes([byte]))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        fields = {"limits_redis_url": url + settings.pop("path", ""), "limits_redis_timeout": 5.0, **settings}
        store = RedisLimitStore(LimitSettings.model_validate({"limits_store": "redis", **fields}))
        yield store, heard
        await store.close()


async def test_it_greets_names_the_script_and_sends_it_where_it_is_not_known() -> None:
    def answer(words: list[bytes]) -> bytes:
        if words[0] == b"EVALSHA" and not any(one[0] == b"EVAL" for one in heard):
            return b"-NOSCRIPT No matching script.\r\n"
        return GRANTED if words[0].startswith(b"EVAL") else b""

    user = {"limits_redis_username": "limits", "limits_redis_password": "secret"}
    async with redis(answer, path="/3", **user) as (store, heard):
        for _ in range(2):
            (verdict,) = await asked(store, [CLAIM])
            assert (verdict.over, verdict.used, verdict.now) == (-1, (3,), 1_700_000_040.5)
    assert heard[:2] == [[b"AUTH", b"limits", b"secret"], [b"SELECT", b"3"]]
    assert [words[0] for words in heard[2:]] == [b"EVALSHA", b"EVAL", b"EVALSHA"]
    assert heard[-1][2:4] == [b"1", PREFIX]


@pytest.mark.parametrize(
    "answer",
    [
        b"-READONLY You can't write against a read only replica.\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$-1\r\n",
        b"*1\r\n:1\r\n",
        b"$%d\r\n" % (MAX_REPLY_BYTES + 1),
        b"$99999999999999999999\r\n",
        b"$3\r\nabcd\r\n",
        b"$1\r\n\xc1\r\n",
        bulk(),
        bulk(1, 2),
        bulk(1, 2, -1),
        bulk(1, 2, -1, 3, 4),
        b"$2\r\n{}\r\n",
        b"+OK\r\n",
    ],
)
async def test_another_answer_loses_the_store_and_the_next_call_connects_anew(answer: bytes) -> None:
    answers = iter([answer, GRANTED])
    async with redis(lambda _: next(answers)) as (store, _):
        with pytest.raises(StoreLost):
            await asked(store, [CLAIM])
        (verdict,) = await asked(store, [CLAIM])
        assert verdict.over == -1


async def test_a_silent_one_is_lost_in_time_and_a_late_answer_is_nobody_s() -> None:
    hangs = iter([True, False])

    def answer(words: list[bytes]) -> bytes:
        return b"$10" if next(hangs) else GRANTED

    async with redis(answer, limits_redis_timeout="0.5") as (store, _):
        with pytest.raises(StoreLost, match="no answer"):
            await asked(store, [CLAIM])
        assert (await asked(store, [CLAIM]))[0].over == -1


def test_words_of_any_bytes_are_one_command() -> None:
    assert command(b"A", b"", b"\r\n\xff") == b"*3\r\n$1\r\nA\r\n$0\r\n\r\n$3\r\n\r\n\xff\r\n"
