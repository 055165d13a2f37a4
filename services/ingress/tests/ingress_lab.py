"""One ingress process on loopback for tests: raw engines, a tiny scheduler on the memory bus, raw clients.

Every wait is bounded by WAIT_S. Closing the lab checks that nothing was left behind.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from integration.servers import eventually

from penstock.common.adapters.event_spool import DiskSpool
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable, complete_key, encode_instance, instance_key
from penstock.common.lifecycle import Lifecycle
from penstock.common.messages import (
    CompleteMarker,
    LoadReport,
    Placement,
    Reason,
    Rejection,
    ScheduleBatch,
    ScheduleReply,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, Instance
from penstock.common.subjects import DEFAULT_SHARD, EVENTS, LOAD, SCHEDULE
from penstock.common.telemetry import Metrics
from penstock.ingress.access_log import AccessLog
from penstock.ingress.adapters.body_helper import BodyHelper
from penstock.ingress.adapters.connection_limit import SharedCounts
from penstock.ingress.adapters.engine_client import EngineClient
from penstock.ingress.adapters.external_client import ExternalClient
from penstock.ingress.adapters.http_server import HttpServer
from penstock.ingress.adapters.pool import Bounds
from penstock.ingress.dividing import Dividing
from penstock.ingress.gateway import Gateway
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.large_bodies import Setup
from penstock.ingress.placing import Placer
from penstock.ingress.service import IngressService
from penstock.ingress.settings import IngressSettings
from penstock.ingress.waiting_room import WaitingRoom

WAIT_S = 30.0
HOST = "127.0.0.1"
MODEL = "m"
CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
STREAM_BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}'


class Response(NamedTuple):
    """A response as a client saw it; `wire` is all of its bytes."""

    status: int
    headers: dict[str, str]
    body: bytes
    wire: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object of our own failures."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "code", "param"}
        return error


class Peer:
    """One end of a connection, on bare bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def exactly(self, size: int) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readexactly(size)

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readuntil(end)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection. Raises ConnectionError if that is a reset."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    async def gone(self) -> None:
        """Wait until the other end has left, in whatever way."""
        try:
            await self.rest()
        except ConnectionError:
            pass

    async def head(self) -> tuple[str, dict[str, str], bytes]:
        """First line, headers, bytes of the next head."""
        raw = await self.until(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines]
        return first, {name.lower(): value.strip() for name, _, value in pairs}, raw

    async def request(self) -> tuple[str, dict[str, str], bytes]:
        """The engine's end: first line, headers and body of the next request."""
        first, headers, _ = await self.head()
        return first, headers, await self.exactly(int(headers.get("content-length", 0)))

    async def response(self, *, bodiless: bool = False) -> Response:
        """The client's end: the next response, whole."""
        first, headers, wire = await self.head()
        status, body = int(first.split()[1]), b""
        if status == 100:
            return Response(status, headers, b"", wire)
        if headers.get("transfer-encoding") == "chunked":
            while size := int((line := await self.until(b"\r\n")).split(b";")[0], 16):
                chunk = await self.exactly(size + 2)
                body, wire = body + chunk[:-2], wire + line + chunk
            wire += line + await self.until(b"\r\n")
        elif "content-length" in headers:
            body = b"" if bodiless else await self.exactly(int(headers["content-length"]))
            wire += body
        elif status not in (204, 304):
            body = await self.rest()
            wire += body
        return Response(status, headers, body, wire)

    def post(self, body: bytes = BODY, path: str = CHAT, **headers: str) -> None:
        """Send a request; underscores in header names stand for hyphens."""
        lines = [f"POST {path} HTTP/1.1", "host: gateway", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode("latin-1") + body)

    async def ask(self, body: bytes = BODY, path: str = CHAT, **headers: str) -> Response:
        self.post(body, path, **headers)
        return await self.response()

    def answer(self, body: bytes = b"{}", status: str = "200 OK", *fields: str) -> None:
        """The engine's end: send a whole response."""
        lines = [f"HTTP/1.1 {status}", "content-type: application/json", *fields]
        self.send("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)

    def begin_stream(self, *fields: str) -> None:
        """The engine's end: send the head of an event stream."""
        lines = ["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked", *fields]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def event(self, data: str) -> bytes:
        """The engine's end: send one event as one chunk; its bytes on the wire."""
        text = f"data: {data}\n\n".encode()
        self.send(wire := b"%x\r\n%b\r\n" % (len(text), text))
        return wire

    def close(self) -> None:
        """End it with a FIN, after what was sent."""
        self.writer.close()

    def reset(self) -> None:
        """End it with a reset."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


class Engine:
    """A listening socket; what is said on its connections is up to the test."""

    def __init__(self, name: str, send_buffer: int = 0) -> None:
        self.name, self.port, self.connections = name, 0, 0
        self._send_buffer = send_buffer
        self._accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self._peers: list[Peer] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        sock = socket.socket()
        if self._send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        sock.bind((HOST, 0))
        self.port = sock.getsockname()[1]
        self._server = await asyncio.start_server(self._accept, sock=sock)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._peers.append(peer := Peer(reader, writer))
        self._accepted.put_nowait(peer)

    async def accept(self) -> Peer:
        """The next connection of the ingress."""
        async with asyncio.timeout(WAIT_S):
            return await self._accepted.get()

    def refuse(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    def close(self) -> None:
        self.refuse()
        for peer in self._peers:
            peer.writer.transport.abort()


Decide = Callable[[ScheduleRequest], Placement | Rejection | None]


class Scheduler:
    """Places on the first instance that is not excluded, unless `decide` says otherwise."""

    def __init__(self, table: InstanceTable) -> None:
        self._table = table
        self.requests: list[ScheduleRequest] = []
        self.batches: list[ScheduleBatch] = []
        self.placed: set[str] = set()
        self.decide: Decide = self.first
        self.silent = False
        self.asked = asyncio.Event()

    def first(self, request: ScheduleRequest) -> Placement | Rejection:
        for instance in self._table.serving(request.model):
            if instance.id not in request.excluded:
                return Placement(request.decision_id, instance.id, policy="first")
        return Rejection(request.decision_id, Reason.NO_INSTANCE, "all excluded", 1.0)

    def __call__(self, batch: ScheduleBatch) -> ScheduleReply | None:
        self.batches.append(batch)
        self.requests += batch.requests
        self.asked.set()
        if self.silent:
            return None
        outcomes = tuple(outcome for r in batch.requests if (outcome := self.decide(r)) is not None)
        self.placed.update(o.decision_id for o in outcomes if isinstance(o, Placement))
        return ScheduleReply("replica", outcomes)


class SlowBus(MemoryBus):
    """A bus whose answers arrive only while `open` is set; asking raises `fault` if there is one."""

    def __init__(self, broker: MemoryBroker, metrics: Metrics) -> None:
        super().__init__(broker, metrics)
        self.fault: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        reply = await super().request(*args, **kwargs)
        await self.open.wait()
        return reply

    def call(self, *args: Any, **kwargs: Any) -> None:
        if self.fault is not None:
            raise self.fault
        super().call(*args, **kwargs)


class Lab:
    """The parts of a worker, assembled as in `penstock.ingress.worker`."""

    def __init__(self, **settings: Any) -> None:
        # Above the delays of a busy test machine; tests of the timeout itself set their own.
        # Tests follow what goes over one connection, however much that is.
        self.settings = IngressSettings.model_validate(
            {"schedule_timeout": 5.0, "backend_max_requests_per_connection": 0, **settings}
        )
        self.broker, self.metrics, self.table = MemoryBroker(), Metrics(), InstanceTable()
        self.bus = SlowBus(self.broker, self.metrics)
        identity = Identity("ingress", "lab", "1")
        self.account = InFlightAccount(identity.id, identity.incarnation)
        root, spool = self.settings.audit_spool, None
        if root is not None:
            spool = DiskSpool(root, identity.writer, identity.incarnation, 64 * 1024 * 1024, "never")
        self.writer = EventWriter(self.bus, identity.writer, identity.incarnation, self.metrics, spool=spool)
        self.access_lines: list[bytes] = []
        self.gateway = Gateway(
            self.settings,
            identity,
            self.table,
            self.account,
            self.writer,
            AccessLog(True, self.access_lines.append),
            self.metrics,
            time.monotonic,
        )
        self.bounds = Bounds(self.settings)
        self.gateway.upstreams = self.upstreams = EngineClient(self.settings, self.metrics, self.bounds)
        self.gateway.dividing = Dividing(self.gateway, self.metrics)
        self.gateway.externals = self.externals = ExternalClient(self.settings, self.metrics, self.bounds)
        setup = Setup(self.settings.block_hash_secret.get_secret_value(), self.settings.block_bytes)
        self.gateway.large_bodies = self.large_bodies = BodyHelper(setup, self.metrics, self.gateway.degraded)
        self.gateway.placer = self.placer = Placer(
            self.bus,
            self.table,
            self.account,
            self.writer,
            identity,
            self.metrics,
            self.settings.schedule_timeout,
            self.settings.max_requests_per_instance,
        )
        self.gateway.waiting = WaitingRoom(self.gateway, SharedCounts.alone(), self.metrics)
        self.service = IngressService(self.gateway, self.bus, Lifecycle(), self.metrics)
        self.server = HttpServer(self.gateway, self.metrics)
        self.scheduler = Scheduler(self.table)
        self.port = 0
        self.published: list[LoadReport] = []
        self.released: set[str] = set()
        self.faults: list[dict[str, Any]] = []
        self._engines: list[Engine] = []
        self._clients: list[Peer] = []
        self._instances: list[Instance] = []
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.faults.append(context))
        sock = socket.socket()
        sock.bind((HOST, 0))
        self.port = sock.getsockname()[1]
        certificates = self.settings.certificates()
        await self.server.listen(sock, certificates.context() if certificates is not None else None)
        self._loops = [
            asyncio.create_task(self.writer.run(), name="events"),
            asyncio.create_task(self.large_bodies.run(), name="large-bodies"),
            asyncio.create_task(
                self.service.sweep((self.server, self.upstreams, self.externals), time.monotonic),
                name="sweep",
            ),
        ]
        self.list_instances()
        await self.start_scheduler()
        await MemoryBus(self.broker).subscribe(LOAD, self._take)
        return self

    def _take(self, report: LoadReport) -> None:
        self.published.append(report)
        self.released.update(report.finished)

    async def start_scheduler(self) -> None:
        scheduler_bus = MemoryBus(self.broker)
        self.scheduler_subscription = await scheduler_bus.serve(SCHEDULE, self.scheduler, DEFAULT_SHARD)

    async def stop_scheduler(self) -> None:
        await self.scheduler_subscription.close()

    def list_instances(self, *instances: Instance) -> None:
        """Add instances to the registry."""
        self._instances += instances
        entries = {instance_key(i.id): Entry(encode_instance(i), n) for n, i in enumerate(self._instances, 1)}
        entries[complete_key("lab")] = Entry(encode_record(CompleteMarker("lab", ("lab",))), 1)
        self.table.apply(Listing(Position("1", len(entries)), entries))

    def instance(self, name: str, port: int, host: str = HOST, **fields: Any) -> None:
        """Add an instance, whether somebody listens there or not."""
        fields = {"models": (MODEL,), "source": "lab", **fields}
        self.list_instances(Instance(id=name, endpoint=Endpoint(host, port), **fields))

    async def engine(self, name: str = "e1", *, send_buffer: int = 0, **fields: Any) -> Engine:
        """Start an engine and add it to the registry."""
        self._engines.append(engine := Engine(name, send_buffer))
        await engine.start()
        self.instance(name, engine.port, **fields)
        return engine

    async def client(self, receive_buffer: int = 0) -> Peer:
        """Connect to the ingress."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (HOST, self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**20 if not receive_buffer else 1024)
        return self.keep(Peer(reader, writer))

    def keep(self, client: Peer) -> Peer:
        """Close it with the lab."""
        self._clients.append(client)
        return client

    async def exchange(self, engine: Engine) -> tuple[Peer, Peer]:
        """A client with a request under way, and the engine's end of it, the request read."""
        client = await self.client()
        client.post()
        peer = await engine.accept()
        await peer.request()
        return client, peer

    def reports(self) -> list[LoadReport]:
        """What the schedulers are told of since the last call."""
        reports = list(self.account.changes())
        for report in reports:
            self._take(report)
        return reports

    async def events(self, kind: str) -> list[dict[str, Any]]:
        """The data of every routing event of one kind so far."""
        assert await self.writer.flush(WAIT_S)
        stream = self.broker.streams.get(EVENTS.name)
        events = [event for m in stream.messages for event in json.loads(m.payload)] if stream else []
        return [event["data"] for event in events if event["type"] == f"penstock.{kind}.v1"]

    async def settled(self) -> list[dict[str, Any]]:
        """Wait until no request is in hand, check that nothing is held for any; their outcomes."""
        await eventually(lambda: not self.gateway.exchanges)
        assert (len(self.account), dict(self.account.by_instance())) == (0, {})
        # Connections that were broken off end a turn later.
        await eventually(
            lambda: (self.bounds.requests, self.bounds.pending, self.bounds.retries) == (0, 0, 0)
        )
        assert (self.gateway.waiting.busy, self.account.on_free) == (False, None)
        assert len(self.gateway.dividing.holds) == 0
        outcomes = await self.events("outcome")
        requests = [outcome["request_id"] for outcome in outcomes]
        assert len(set(requests)) == len(requests)
        self.reports()
        placed = self.scheduler.placed | {e["decision_id"] for e in await self.events("placement")}
        assert placed <= self.released
        return outcomes

    async def outcome(self) -> dict[str, Any]:
        """The one outcome there is, once nothing is held any more."""
        (outcome,) = await self.settled()
        return outcome

    def metric(self, name: str, *labels: str) -> float:
        """One cell."""
        (family,) = [f for f in self.metrics.snapshot() if f.name == name]
        return sum(sample.value for sample in family.samples if sample.labels == labels)

    async def drain(self, timeout_s: float) -> None:
        """Stop as a worker does."""
        self.gateway.draining = True
        self.server.stop_accepting()
        await self.service.drain(timeout_s)
        await self.upstreams.close()
        await self.externals.close()
        await self.server.close(1.0)

    async def close(self) -> None:
        """Let every peer leave, then check that the ingress let go of everything."""
        self.bus.open.set()
        for client in self._clients:
            client.close()
        try:
            await self.settled()
            for engine in self._engines:
                engine.close()
            for gauge in ("open", "idle"):
                await eventually(lambda: not self.metric("penstock_ingress_upstream_connections", gauge))  # noqa: B023
            await eventually(lambda: not self.metric("penstock_ingress_connections"))
        finally:
            await self.upstreams.close()
            await self.externals.close()
            await self.server.close(0.0)
            self.server.stop_accepting()
            for task in self._loops:
                task.cancel()
            await asyncio.gather(*self._loops, return_exceptions=True)
        assert self.faults == []
