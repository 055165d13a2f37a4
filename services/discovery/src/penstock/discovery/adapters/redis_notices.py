"""Keyspace notifications: which record changed, at once, where the server says so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

from penstock.discovery.adapters.redis_client import FAILURES, Node, heed_cancellation
from penstock.discovery.adapters.redis_listing import glob_escaped

log = logging.getLogger(__name__)

# A connection that went silent is found by asking; then, or when it broke off, another one is made.
PING_EVERY_S, RETRY_S = 2.0, 1.0
MAX_PENDING = 1024
DELETED = frozenset({b"del", b"expired", b"evicted", b"rename_from", b"move_from"})


class Notices:
    """What changed since it was last taken: by server, key -> whether it is gone.

    Beyond `MAX_PENDING` of a server, and when listening begins, `overflowed` says that only a reading of
    everything tells.
    """

    def __init__(self, prefix: bytes, db: int, woken: asyncio.Event) -> None:
        """`woken` is set when there is something to take."""
        self._prefix, self._woken = prefix, woken
        self._space = f"__keyspace@{db}__:".encode()
        self._tasks: dict[Node, asyncio.Task[None]] = {}
        self._pending: dict[Node, dict[bytes, bool]] = {}
        self.overflowed = False

    def follow(self, nodes: Iterable[Node]) -> None:
        """Listen to these servers, and to no other."""
        wanted = set(nodes)
        for node in self._tasks.keys() - wanted:
            self._tasks.pop(node).cancel()
        for node in wanted - self._tasks.keys():
            name = f"redis notifications of {node.address[0]}:{node.address[1]}"
            self._tasks[node] = asyncio.create_task(self._follow(node), name=name)

    def take(self) -> dict[Node, dict[bytes, bool]]:
        """What is pending, which then is not any more."""
        taken, self._pending, self.overflowed = self._pending, {}, False
        return taken

    def __bool__(self) -> bool:
        return bool(self._pending) or self.overflowed

    async def close(self) -> None:
        """Stop listening."""
        tasks = [*self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, node: Node) -> None:
        while True:
            try:
                await self._listen(node)
            except FAILURES as exc:
                heed_cancellation()
                log.debug("no notifications of %s:%d for now: %s", *node.address, exc)
            await asyncio.sleep(RETRY_S)

    async def _listen(self, node: Node) -> None:
        pubsub, asked = node.pubsub(), False
        try:
            await pubsub.psubscribe(glob_escaped(self._space + self._prefix) + b"*")
            while True:
                message = await pubsub.get_message(timeout=PING_EVERY_S)
                heed_cancellation()
                if message is not None:
                    asked = False
                    self._hear(node, message)
                elif asked:
                    raise TimeoutError("it does not answer")
                else:
                    asked = True
                    await pubsub.ping()
        finally:
            with contextlib.suppress(*FAILURES):
                await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    def _hear(self, node: Node, message: dict[str, object]) -> None:
        channel, event = message.get("channel"), message.get("data")
        if message.get("type") == "psubscribe":
            # What changed before was not heard.
            self.overflowed = True
            self._woken.set()
        if message.get("type") != "pmessage" or not isinstance(channel, bytes):
            return
        key = channel.removeprefix(self._space)
        pending = self._pending.setdefault(node, {})
        if len(pending) < MAX_PENDING:
            pending[key] = event in DELETED
        else:
            self.overflowed = True
        self._woken.set()
