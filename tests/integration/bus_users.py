"""A NATS server with the users of `penstock up`, and what any of its users may be made to try."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client

from integration.servers import NatsServer, Process
from integration.stack import Stack
from penstock.cli.nats_server import new_passwords
from penstock.common.permissions import SERVICES_ACCOUNT, accounts

# One more user, for the tests alone: it may do everything in the services' account.
ALL = "all"


@dataclass
class UserServer:
    """A running server; each user has a password of its own."""

    server: NatsServer
    passwords: dict[str, str]

    def url(self, user: str) -> str:
        return f"nats://{user}:{self.passwords[user]}@127.0.0.1:{self.server.port}"

    @asynccontextmanager
    async def client(self, user: str) -> AsyncIterator[Guest]:
        """A connection of nats-py, which knows nothing of ours."""
        refusals: list[str] = []

        async def note(exc: Exception) -> None:
            refusals.append(str(exc))

        # A prefix of its own for each user, as penstock's processes have it.
        client = await nats.connect(
            self.url(user), error_cb=note, inbox_prefix=f"_INBOX.{user}.guest.run.answers".encode()
        )
        try:
            yield Guest(client, refusals)
        finally:
            await client.close()


@dataclass
class Guest:
    """One connection and what the server refused it."""

    client: Client
    refusals: list[str]

    async def refused(self, attempt: Callable[[Client], Coroutine[Any, Any, Any]]) -> bool:
        """Whether the server refuses what `attempt` does."""
        self.refusals.clear()
        await attempt(self.client)
        # The first ping of nats-py may overtake what was published before.
        await self.client.flush()
        await self.client.flush()
        return any("permissions violation" in text for text in self.refusals)


@contextlib.contextmanager
def server_with_users() -> Iterator[UserServer]:
    """The accounts of `penstock up`, and ALL."""
    passwords = {**new_passwords(), ALL: "all"}
    config = {"accounts": accounts(passwords)}
    config["accounts"][SERVICES_ACCOUNT]["users"].append({"user": ALL, "password": passwords[ALL]})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nats.conf"
        file.write_text(json.dumps(config))
        with NatsServer("-c", str(file)) as server:
            yield UserServer(server, passwords)


class StackOfUsers(Stack):
    """Services as processes, each with a user of its own, given in the environment as `penstock up` does."""

    users: UserServer

    def _service(self, name: str, *flags: str, admin_port: int = 0) -> Process:
        env = {"PENSTOCK_NATS_URL": self.users.url(name)}
        process = Process.module(f"penstock.{name}", "--admin-port", str(admin_port), *flags, env=env)
        return self.exits.enter_context(process)


@contextlib.contextmanager
def stack_of_users() -> Iterator[StackOfUsers]:
    """The server and nothing else yet; everything started on it ends with the block."""
    with server_with_users() as users, contextlib.ExitStack() as exits:
        stack = StackOfUsers(users.server, exits=exits)
        stack.users = users
        yield stack
