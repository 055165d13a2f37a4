"""Reading all records out of Redis, or some: bounded in number and size, several in one round trip."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

from penstock.common.records import MAX_RECORD_BYTES
from penstock.discovery.adapters.redis_client import Command, Node, RedisClient, RedisFailed
from penstock.discovery.redis_table import MAX_RECORDS, Reading, Value

SCAN_COUNT, READ_BATCH = 1000, 200
MAX_TOTAL_BYTES = 64 * 1024 * 1024
# For all nodes and batches of one reading; a single command has the socket timeout.
READING_TIMEOUT_S = 30.0
_LOST_BY = ("flushall", "flushdb", "swapdb")


class _Emptied(Exception):
    """A server was emptied, or became another one, while it was read."""


async def read_all(client: RedisClient, prefix: bytes, known: Callable[[bytes], bool]) -> Reading:
    """Every record; beyond the bounds, those whose key is `known` come first.

    Raises:
        RedisFailed: it could not be read as a whole.
    """
    try:
        async with asyncio.timeout(READING_TIMEOUT_S):
            try:
                return await _read_all(client, prefix, known)
            except _Emptied:
                return await _read_all(client, prefix, known)
    except TimeoutError:
        raise RedisFailed(f"a reading takes more than {READING_TIMEOUT_S:g} s") from None
    except _Emptied:
        raise RedisFailed("the servers change faster than they can be read") from None


async def _read_all(client: RedisClient, prefix: bytes, known: Callable[[bytes], bool]) -> Reading:
    nodes = await client.nodes()
    before = await _epoch(nodes)
    keys: dict[bytes, Node] = {}
    cut = False
    for node in nodes:
        cut = await _scan(node, prefix, known, keys) or cut
    values: dict[bytes, Value] = {}
    left_bytes = MAX_TOTAL_BYTES
    for node in nodes:
        own = sorted((key for key, holder in keys.items() if holder is node), key=known, reverse=True)
        for start in range(0, len(own), READ_BATCH):
            batch = await read_some(node, own[start : start + READ_BATCH])
            left_bytes -= sum(len(value) for value in batch.values())
            if left_bytes < 0:
                return Reading(values, before, cut=True)
            values |= batch
    # What was emptied halfway would look as if each record had been deleted.
    if await _epoch(nodes) != before:
        raise _Emptied
    return Reading(values, before, cut)


async def read_some(node: Node, keys: Sequence[bytes]) -> dict[bytes, Value]:
    """Value by key, without keys that are not there. Of a value that is too large, its head is read.

    Raises:
        RedisFailed: the server cannot be asked, or refuses.
    """
    answers = await node.run([("GETRANGE", key, 0, MAX_RECORD_BYTES) for key in keys])
    values = {key: _value(answer) for key, answer in zip(keys, answers, strict=True)}
    empty = [key for key in keys if not values[key]]
    if empty:
        there = await node.run([("EXISTS", key) for key in empty])
        for key, answer in zip(empty, there, strict=True):
            if _refused(answer):
                values[key] = "it is empty"
            else:
                del values[key]
    return values


def _value(answer: Any) -> Value:
    if isinstance(answer, Exception) and str(answer).startswith("WRONGTYPE"):
        return "it is not a string"
    value = _refused(answer)
    if not isinstance(value, bytes):
        raise RedisFailed(f"the answer to GETRANGE is a {type(value).__name__}")
    if len(value) > MAX_RECORD_BYTES:
        return f"it has more than {MAX_RECORD_BYTES} bytes"
    return value


def _refused(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise RedisFailed(str(answer)[:256] or type(answer).__name__)
    return answer


async def _scan(node: Node, prefix: bytes, known: Callable[[bytes], bool], keys: dict[bytes, Node]) -> bool:
    """Add the keys of a node; whether there are more than the bound."""
    cut = False
    cursor: bytes | int = 0
    pattern = glob_escaped(prefix) + b"*"
    while True:
        command: Command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
        (answer,) = await node.run([command])
        match _refused(answer):
            case (cursor, [*found]):
                pass
            case _:
                raise RedisFailed("the answer to SCAN is not one")
        for key in found:
            if isinstance(key, bytes) and key not in keys:
                # Twice the bound, so that what is known survives a flood of others.
                if len(keys) < MAX_RECORDS or (known(key) and len(keys) < 2 * MAX_RECORDS):
                    keys[key] = node
                else:
                    cut = True
        if int(cursor) == 0:
            return cut


async def _epoch(nodes: Sequence[Node]) -> str:
    """Changes when a server starts, or is emptied; empty if one does not say, as when its rules forbid it."""
    marks = []
    for node in nodes:
        server, stats = await node.run([("INFO", "server"), ("INFO", "commandstats")])
        if not isinstance(server, dict) or not isinstance(stats, dict):
            return ""
        calls = [_calls(stats.get(f"cmdstat_{command}")) for command in _LOST_BY]
        marks.append(f"{server.get('run_id', '')}:{':'.join(map(str, calls))}")
    return " ".join(sorted(marks))


def _calls(stat: Any) -> Any:
    return stat.get("calls", 0) if isinstance(stat, dict) else 0


def glob_escaped(prefix: bytes) -> bytes:
    """As a pattern that matches nothing else."""
    return re.sub(rb"([*?\[\]\\^-])", rb"\\\1", prefix)
