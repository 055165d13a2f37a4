"""Connections to Redis: one server, the master that sentinels name, or the primaries of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from penstock.discovery.redis_settings import CLUSTER, SENTINEL, RedisAddress, RedisSettings

Address = tuple[str, int]
Command = tuple[bytes | str | int, ...]

# What the client raises; the lower half where something answers that is no Redis.
FAILURES = (
    *(RedisError, OSError, TimeoutError, EOFError),
    *(ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError),
)
MAX_NODES = 1024


class RedisFailed(Exception):
    """Redis did not do what was asked; the text says why, to a person, and holds no secret."""


def heed_cancellation() -> None:
    """The client writes within `asyncio.wait_for`, which in Python 3.11 loses a cancellation that comes as
    the write ends: its task would never stop."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextlib.asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Failures of the client as RedisFailed."""
    try:
        yield
        heed_cancellation()
    except FAILURES as exc:
        heed_cancellation()
        raise RedisFailed(str(exc)[:256] or type(exc).__name__) from exc


class Node:
    """One server."""

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        self.address = address
        self._redis: Redis = Redis(host=address[0], port=address[1], **options)

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """The answers, in one round trip; a command that the server refuses has an exception as answer.

        Raises:
            RedisFailed: the server cannot be asked.
        """
        async with translated():
            pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            if len(answers) != len(commands):
                raise RedisFailed(f"{len(answers)} answers to {len(commands)} commands")
            return answers

    def pubsub(self) -> PubSub:
        """A connection of its own for messages."""
        return self._redis.pubsub()

    async def close(self) -> None:
        with contextlib.suppress(*FAILURES):
            await self._redis.aclose()


@dataclass(frozen=True)
class _Slots:
    """Which address serves the slots from `first` to `last`."""

    first: int
    last: int
    address: Address


class RedisClient:
    """The servers as they are now; connections open when they are used."""

    def __init__(self, settings: RedisSettings) -> None:
        self._where = settings.redis_address()
        self._options = _options(settings, self._where)
        self._nodes: dict[Address, Node] = {}
        self._slots: tuple[_Slots, ...] = ()
        self._sentinel: Any = None
        if self._where.kind == SENTINEL:
            sentinel_options = _sentinel_options(settings, self._options)
            self._sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
                [*self._where.members], sentinel_kwargs=sentinel_options
            )

    async def nodes(self) -> tuple[Node, ...]:
        """The servers that together hold all keys.

        Raises:
            RedisFailed: they are not known.
        """
        addresses = await self._addresses()
        for gone in self._nodes.keys() - {*addresses, *self._where.members}:
            await self._nodes.pop(gone).close()
        return tuple(map(self._node, addresses))

    async def run(self, key: str | bytes, *command: bytes | str | int) -> Any:
        """The answer of the server that holds `key`.

        Raises:
            RedisFailed: it cannot be asked, or refuses.
        """
        async with translated():
            await self.nodes()
            slot = key_slot(key.encode() if isinstance(key, str) else key)
            owner = next(part.address for part in self._slots if part.first <= slot <= part.last)
            (answer,) = await self._node(owner).run([command])
            if isinstance(answer, Exception):
                raise answer
            return answer

    async def close(self) -> None:
        """Give connections back."""
        nodes = [*self._nodes.values()]
        self._nodes.clear()
        for node in nodes:
            await node.close()
        for sentinel in self._sentinel.sentinels if self._sentinel is not None else ():
            with contextlib.suppress(*FAILURES):
                await sentinel.aclose()

    def _node(self, address: Address) -> Node:
        if address not in self._nodes:
            self._nodes[address] = Node(address, self._options)
        return self._nodes[address]

    async def _addresses(self) -> tuple[Address, ...]:
        if self._where.kind == CLUSTER:
            self._slots = await self._ask_cluster()
        elif self._where.kind == SENTINEL:
            self._slots = await self._ask_sentinels()
        else:
            self._slots = _all_slots(self._where.members[0])
        return tuple(dict.fromkeys(part.address for part in self._slots))

    async def _ask_sentinels(self) -> tuple[_Slots, ...]:
        """Without a sentinel that answers, the master stays who it was."""
        try:
            async with translated():
                host, port = await self._sentinel.discover_master(self._where.master)
                return _all_slots((_text(host), int(port)))
        except RedisFailed as exc:
            if self._slots:
                return self._slots
            raise RedisFailed(f"no sentinel names the master {self._where.master}: {exc}") from exc

    async def _ask_cluster(self) -> tuple[_Slots, ...]:
        """As the first node that answers has it; known ones are asked before those of the settings."""
        known = dict.fromkeys((*(part.address for part in self._slots), *self._where.members))
        trouble = "no node answers"
        for address in known:
            try:
                async with translated():
                    (answer,) = await self._node(address).run([("CLUSTER", "SLOTS")])
                    if isinstance(answer, Exception):
                        raise answer
                    return _covering(answer, address)
            except RedisFailed as exc:
                trouble = f"{address[0]}:{address[1]}: {exc}"
        raise RedisFailed(f"the cluster's nodes are not known, {trouble}")


def _covering(answer: Any, asked: Address) -> tuple[_Slots, ...]:
    """The reply to CLUSTER SLOTS. Slots that nobody serves would read as keys that are gone."""
    slots = tuple(sorted(_parse_slots(answer, asked), key=lambda part: part.first))
    ends = [-1, *(part.last for part in slots)]
    starts = [*(part.first for part in slots), REDIS_CLUSTER_HASH_SLOTS]
    if any(start > end + 1 for start, end in zip(starts, ends, strict=True)):
        raise RedisFailed("some slots of the cluster are served by nobody")
    if len({part.address for part in slots}) > MAX_NODES:
        raise RedisFailed(f"the cluster has more than {MAX_NODES} primaries")
    return slots


def _parse_slots(answer: Any, asked: Address) -> list[_Slots]:
    """Ranges as [first, last, primary, replicas...]. A node that has no host is the one that was asked."""
    return [
        _Slots(int(first), int(last), (_text(primary[0]) or asked[0], int(primary[1])))
        for first, last, primary, *_ in answer
    ]


def _all_slots(address: Address) -> tuple[_Slots, ...]:
    return (_Slots(0, REDIS_CLUSTER_HASH_SLOTS - 1, address),)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")


def _options(settings: RedisSettings, where: RedisAddress) -> dict[str, Any]:
    timeout_s = settings.discovery_redis_socket_timeout
    backoff = ExponentialWithJitterBackoff(base=0.02, cap=0.5)
    options: dict[str, Any] = {
        "db": where.db,
        "username": settings.discovery_redis_username or None,
        "password": settings.discovery_redis_password.get_secret_value() or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(backoff, settings.discovery_redis_retry_times),
        "protocol": 2,  # What servers before 6 speak, too.
    }
    if where.tls:
        files = {
            "ssl_ca_certs": settings.discovery_redis_tls_ca,
            "ssl_certfile": settings.discovery_redis_tls_cert,
            "ssl_keyfile": settings.discovery_redis_tls_key,
        }
        options |= {"ssl": True} | {name: str(path) for name, path in files.items() if path}
    return options


def _sentinel_options(settings: RedisSettings, options: dict[str, Any]) -> dict[str, Any]:
    return options | {
        "db": 0,
        "username": settings.discovery_redis_sentinel_username or None,
        "password": settings.discovery_redis_sentinel_password.get_secret_value() or None,
    }
