"""Being listed: NATS's micro-service discovery (ADR-32), as `nats micro ls` asks for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from penstock.common.adapters.nats_connection import NatsConnection
from penstock.common.adapters.nats_wire import Message
from penstock.common.subjects import token

PENDING_QUESTIONS = 256


class Directory:
    """The entry of one process, answered for as long as it lives."""

    def __init__(
        self, connection: NatsConnection, name: str, instance: str, version: str, metadata: Mapping[str, str]
    ) -> None:
        self._connection = connection
        self._about = {"name": name, "id": instance, "version": version, "metadata": dict(metadata)}
        self._started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    async def open(self) -> None:
        """Answer PING, INFO and STATS: to everybody, by name, and by name and id."""
        more: dict[str, dict[str, Any]] = {
            "PING": {},
            "INFO": {"description": "", "endpoints": []},
            "STATS": {"started": self._started, "endpoints": []},
        }
        name, instance = self._about["name"], token(str(self._about["id"]))
        for verb, fields in more.items():
            answer = {"type": f"io.nats.micro.v1.{verb.lower()}_response", **self._about, **fields}
            handle = partial(self._answer, msgspec.json.encode(answer))
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{instance}"):
                await self._connection.subscribe(
                    subject, handle, pending_messages=PENDING_QUESTIONS, label="$SRV"
                )

    def _answer(self, payload: bytes, message: Message) -> None:
        if message.reply:
            self._connection.send(message.reply, payload)
