"""One ingress process behind the shared port: `python -m penstock.common.machine_code penstock.ingress`
and this module's name, the descriptors of the channel and of the counts.

The parent sends settings, address and identity over the channel, then asks for snapshots; when the
channel ends, the worker drains.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping

import msgspec

from penstock.common.adapters.host import Host
from penstock.common.bus import Bus
from penstock.common.identity import new_identity
from penstock.common.instances import InstanceTable
from penstock.common.lifecycle import run_service
from penstock.common.live_config import LiveConfig
from penstock.common.profiles import ModelProfiles
from penstock.common.telemetry import FamilySnapshot
from penstock.common.tracing import Sampler, Span, Spans
from penstock.ingress.access_log import AccessLog
from penstock.ingress.adapters.admin_relay import AdminCall, AdminRelay, AdminReply
from penstock.ingress.adapters.body_helper import BodyHelper
from penstock.ingress.adapters.channel import Channel
from penstock.ingress.adapters.connection_limit import WAITING, SharedCounts, counts_bytes
from penstock.ingress.adapters.engine_client import EngineClient
from penstock.ingress.adapters.external_client import ExternalClient
from penstock.ingress.adapters.http_server import HttpServer
from penstock.ingress.adapters.listening import listening_socket
from penstock.ingress.adapters.parent_limits import CountCall, CountReply, ParentLimitStore
from penstock.ingress.adapters.pool import Bounds
from penstock.ingress.adapters.shared_pools import SharedPools
from penstock.ingress.api_keys import LIVE, ApiKeys
from penstock.ingress.body_reader import tokenizer_of
from penstock.ingress.bus_limit_store import BusLimitStore
from penstock.ingress.capture import Capture
from penstock.ingress.certificates import Certificates
from penstock.ingress.dividing import Dividing
from penstock.ingress.gateway import Gateway
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.key_keeping import KeyKeeper
from penstock.ingress.large_bodies import Setup
from penstock.ingress.limiter import Limiter
from penstock.ingress.placing import Placer
from penstock.ingress.ports import LimitStore
from penstock.ingress.profile_keeping import ProfileKeeper
from penstock.ingress.service import IngressService
from penstock.ingress.settings import IngressSettings
from penstock.ingress.traced import Tracing
from penstock.ingress.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

# What clients get to take their last bytes, however little the drain has left.
FLUSH_S = 1.0
SPANS_EVERY_S, SPANS_AT_ONCE = 0.5, 256
# File descriptors beside those of clients and of the instances that serve them: kept connections, bus, log.
SPARE_FILES = 4096


class Start(msgspec.Struct):
    """What a worker is told first; `settings` holds the secrets too, `index` counts the workers."""

    settings: dict[str, str | int | float | bool | None]
    id: str
    port: int
    index: int
    # How the worker before it ended, if that was not asked for.
    ended: str = ""
    # For HTTPS. The files are the parent's affair: they may be broken when a worker is started again.
    tls: Certificates | None = None


class Report(msgspec.Struct, tag="report"):
    """What a worker answers: why it is not ready, and its metrics."""

    missing: list[str]
    snapshot: list[FamilySnapshot]


class SpanBatch(msgspec.Struct, tag="spans"):
    """Spans that ended in a worker: its parent exports them."""

    spans: list[Span]


# What comes over the channel, to the parent and from it: "?" asks for a report.
FromWorker = Report | AdminCall | CountCall | SpanBatch
FromParent = str | AdminReply | CountReply | Certificates


def main() -> int:
    """Run until the channel or a signal says stop."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    return run_service(lambda: serve(channel, int(sys.argv[2])))


async def serve(channel: Channel, counts_fd: int) -> None:
    """Assemble one worker and run it."""
    await channel.open()
    start: Start | None = await channel.receive(Start)
    if start is None:
        return
    settings = IngressSettings.model_validate(start.settings)
    allow_files(settings.connection_limit + settings.gateway_max_connections + SPARE_FILES)
    host = Host(new_identity("ingress", start.id), settings)
    table = InstanceTable()
    account = InFlightAccount(host.identity.id, host.identity.incarnation)
    gateway = Gateway(
        settings,
        host.identity,
        table,
        account,
        host.events,
        AccessLog(settings.access_log, _write_stderr),
        host.metrics,
        time.monotonic,
    )
    workers, index = settings.workers, start.index
    shared = SharedPools(counts_fd, counts_bytes(workers), workers, index) if workers > 1 else None
    bounds = Bounds(settings, shared)
    gateway.upstreams = upstreams = EngineClient(settings, host.metrics, bounds)
    gateway.dividing = Dividing(gateway, host.metrics)
    gateway.externals = externals = ExternalClient(settings, host.metrics, bounds)
    setup = Setup(
        settings.block_hash_secret.get_secret_value(),
        settings.block_bytes,
        settings.tokenizer_path,
        settings.token_block_size,
    )
    if (tokenizer := tokenizer_of(setup)) is not None:
        gateway.use(tokenizer, setup)
    gateway.large_bodies = large_bodies = BodyHelper(
        setup, host.metrics, gateway.degraded, keep=tokenizer is not None
    )
    gateway.placer = placer = Placer(
        host.bus,
        table,
        account,
        host.events,
        host.identity,
        host.metrics,
        settings.schedule_timeout,
        settings.max_requests_per_instance,
    )
    if start.ended:
        gateway.degraded("worker", False, start.ended)
    capture = Capture(
        host.bus,
        host.events,
        host.identity,
        host.metrics,
        forward_credentials=settings.mirror_forward_credentials,
    )
    store, of_parent = limit_store(settings, host.bus, channel)
    limiter = Limiter(settings, host.metrics, gateway.degraded, time.time, store)
    live = LiveConfig()
    waiting = SharedCounts(counts_fd, settings.workers, start.index, WAITING)
    gateway.waiting = WaitingRoom(gateway, waiting, host.metrics)
    keys = None
    if settings.api_keys:
        gateway.api_keys = limiter.keys = ApiKeys(time.time)

        def keys_changed() -> None:
            gateway.limits = limiter.if_active

        keys = KeyKeeper(gateway.api_keys, settings.api_keys, live, gateway.degraded, keys_changed)
        host.lifecycle.require("api-keys", keys.missing)
        if settings.api_keys != LIVE:
            host.lifecycle.add_loop("api-keys-file", keys.follow_file())

    def configure(models: Mapping[str, ModelProfiles]) -> None:
        gateway.dividing.configure(models)
        placer.profiles.configure(models)
        limiter.rates.configure(models)
        gateway.limits = limiter.if_active

    profiles = ProfileKeeper(
        live,
        settings.profiles_file,
        gateway.dividing.methods.fault,
        configure,
        gateway.degraded,
    )
    service = IngressService(gateway, host.bus, host.lifecycle, host.metrics)
    server = HttpServer(gateway, host.metrics, SharedCounts(counts_fd, settings.workers, start.index))

    async def send_spans(most: int) -> None:
        try:
            while batch := spans.take(most):
                await channel.send(SpanBatch(batch))
        except OSError as exc:
            log.debug("the parent takes no spans: %s", exc)

    async def keep_sending_spans() -> None:
        while True:
            await asyncio.sleep(SPANS_EVERY_S)
            await send_spans(SPANS_AT_ONCE)

    spans = Spans(host.metrics)
    if settings.otlp_endpoint:
        ratio, inbound = settings.trace_sample_ratio, settings.trace_inbound_per_second
        sampler = Sampler(ratio, inbound, random.random, time.monotonic)
        gateway.sample = Tracing(gateway, sampler, spans, time.time_ns).sampling()
        host.lifecycle.add_loop("spans", keep_sending_spans())

    if settings.admin_on_public_port:
        server.admin = AdminRelay(channel.send)

    async def answer_parent() -> None:
        message: FromParent | None
        while (message := await channel.receive(FromParent)) is not None:
            if isinstance(message, AdminReply):
                if server.admin is not None:
                    server.admin.answered(message)
                continue
            if isinstance(message, Certificates):
                server.use(message.context())
                continue
            if isinstance(message, CountReply):
                if of_parent is not None:
                    of_parent.answered(message)
                continue
            await channel.send(Report(host.lifecycle.missing(), host.metrics.snapshot()))
        host.lifecycle.stopping.set()
        await asyncio.Event().wait()

    async def drain() -> None:
        gateway.draining = True
        server.stop_accepting()
        deadline = time.monotonic() + settings.drain_timeout
        await service.drain(settings.drain_timeout)
        await send_spans(SPANS_AT_ONCE)
        await upstreams.close()
        await externals.close()
        await server.close(max(FLUSH_S, deadline - time.monotonic()))

    # Requests leave no cycles behind; the default thresholds would walk all live objects for nothing.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if start.tls is not None:
        # That of the parent says that the files changed; who signals all processes means that one.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    await server.listen(
        listening_socket(settings.host, start.port), start.tls.context() if start.tls is not None else None
    )
    if settings.profiles_file is not None:
        host.lifecycle.add_loop("profiles-file", profiles.follow_file())
    host.lifecycle.add_loop("limits", limiter.run())
    for name, loop in (
        ("registry-watch", service.watch(profiles)),
        ("load-report", service.report()),
        ("sweep", service.sweep((server, upstreams, externals), time.monotonic)),
        ("large-bodies", large_bodies.run()),
        ("live-config", service.follow_config(live, capture, limiter, keys, profiles)),
        ("mirror-copies", capture.run()),
        ("parent", answer_parent()),
    ):
        host.lifecycle.add_loop(name, loop)
    await host.run(drain, None)


def limit_store(
    settings: IngressSettings, bus: Bus, channel: Channel
) -> tuple[LimitStore, ParentLimitStore | None]:
    """Where limits are counted, and the same again if that is the parent."""
    if settings.limits_store == "redis":
        # 7 MB that others need not pay; where OpenTelemetry is installed, this library imports it.
        from penstock.ingress.adapters.limit_store import RedisLimitStore

        return RedisLimitStore(settings), None
    if settings.limits_store == "nats":
        return BusLimitStore(bus, settings.limits_nats_timeout), None
    of_parent = ParentLimitStore(channel.send)
    return of_parent, of_parent


def allow_files(wanted: int) -> None:
    """Raise the soft limit of open files towards `wanted`: the usual 1,024 is less than --connection-limit
    needs, and a connection that finds no descriptor is closed without being counted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _write_stderr(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()


if __name__ == "__main__":
    raise SystemExit(main())
