"""Every metric of every service, by building its parts as its main does, on a bus in memory.

Nothing runs and nothing is connected. A test compares this with what running services export.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

from penstock.common.adapters.host import expose_process
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.adapters.nats_connection import NatsConnection
from penstock.common.adapters.routing_log import RoutingLog
from penstock.common.config_keeping import ConfigWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable
from penstock.common.lifecycle import Lifecycle
from penstock.common.live_config import LiveConfig, expose_config
from penstock.common.model import Endpoint
from penstock.common.settings import BusSettings, ServiceSettings
from penstock.common.telemetry import FamilySnapshot, Metrics
from penstock.common.tracing import Spans
from penstock.discovery.adapters.static_source import endpoints_source
from penstock.discovery.ports import Reading
from penstock.discovery.reconcile import Verdict
from penstock.discovery.register.service import Registrar, Timing
from penstock.discovery.register.settings import RegisterSettings
from penstock.discovery.service import Discovery
from penstock.discovery.settings import DiscoverySettings
from penstock.discovery.surroundings import ProbePolicy
from penstock.ingress.access_log import AccessLog
from penstock.ingress.adapters.body_helper import BodyHelper
from penstock.ingress.adapters.connection_limit import SharedCounts
from penstock.ingress.adapters.engine_client import EngineClient
from penstock.ingress.adapters.external_client import ExternalClient
from penstock.ingress.adapters.http_server import HttpServer
from penstock.ingress.adapters.tls_listener import TlsListener
from penstock.ingress.bus_limit_store import BusLimitStore
from penstock.ingress.capture import Capture
from penstock.ingress.certificate_keeping import CertificateKeeper
from penstock.ingress.certificates import Certificates
from penstock.ingress.dividing import Dividing
from penstock.ingress.gateway import Gateway
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.large_bodies import Setup
from penstock.ingress.limiter import Limiter
from penstock.ingress.parent import Parent
from penstock.ingress.placing import Placer
from penstock.ingress.service import IngressService
from penstock.ingress.settings import IngressSettings
from penstock.ingress.waiting_room import WaitingRoom
from penstock.mirror.__main__ import export
from penstock.mirror.adapters.config_file import MirrorFile
from penstock.mirror.adapters.shadow_client import ShadowClient
from penstock.mirror.replay import Replay
from penstock.mirror.report import Report
from penstock.mirror.service import Configuration
from penstock.scheduler.service import SchedulerService
from penstock.scheduler.settings import SchedulerSettings


class _Parts:
    """What `penstock.common.adapters.host.Host` assembles, less the connection and the listener."""

    def __init__(self, service: str) -> None:
        self.identity = Identity(service, "docs", "1")
        self.metrics, self.lifecycle = Metrics(), Lifecycle()
        self.bus = MemoryBus(MemoryBroker(), Metrics())
        NatsConnection(BusSettings.model_validate({}), self.identity.writer, self.metrics)
        settings = ServiceSettings.model_validate({})
        self.events = RoutingLog(self.bus, self.identity, self.metrics, settings).events
        expose_process(self.metrics, self.lifecycle)


def _ingress() -> Metrics:
    parts, settings, table = _Parts("ingress"), IngressSettings.model_validate({}), InstanceTable()
    metrics, account = parts.metrics, InFlightAccount("docs", "1")
    log = AccessLog(False, lambda _: None)
    gateway = Gateway(settings, parts.identity, table, account, parts.events, log, metrics, time.monotonic)
    gateway.upstreams = EngineClient(settings, metrics)
    gateway.dividing = Dividing(gateway, metrics)
    gateway.externals = ExternalClient(settings, metrics)
    BodyHelper(Setup("", settings.block_bytes), metrics, gateway.degraded)
    gateway.placer = Placer(
        parts.bus, table, account, parts.events, parts.identity, metrics, settings.schedule_timeout
    )
    Capture(parts.bus, parts.events, parts.identity, metrics, forward_credentials=False)
    store = BusLimitStore(parts.bus, settings.limits_nats_timeout)
    Limiter(settings, metrics, gateway.degraded, time.time, store)
    Spans(metrics)
    gateway.waiting = WaitingRoom(gateway, SharedCounts.alone(), metrics)
    IngressService(gateway, parts.bus, parts.lifecycle, metrics)
    HttpServer(gateway, metrics, SharedCounts.alone())
    return metrics


def _ingress_parent() -> Metrics:
    async def nobody(_: object) -> object:
        raise NotImplementedError

    lifecycle = Lifecycle()
    parent = Parent(IngressSettings.model_validate({}), "docs", 0, lifecycle, nobody)  # type: ignore[arg-type]  # never asked
    lifecycle.abandon()
    expose_config(LiveConfig(), parent.metrics)
    return parent.metrics


def ingress_tls() -> Metrics:
    """What an ingress with `--tls-cert` exports besides."""
    metrics = Metrics()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    TlsListener(context, lambda: None, lambda _: None, metrics, handshake_s=1, shutdown_s=1)
    CertificateKeeper(Certificates(b"", b""), lambda: None, metrics, lambda what, active, cause: None)
    return metrics


def _scheduler() -> Metrics:
    parts, settings = _Parts("scheduler"), SchedulerSettings.model_validate({})
    Spans(parts.metrics)
    SchedulerService(parts.bus, parts.identity, parts.events, parts.metrics, parts.lifecycle, settings)
    return parts.metrics


class _NoProber:
    """Fulfils the probers' ports; never asked."""

    async def check(self, endpoint: Endpoint) -> Verdict:
        raise NotImplementedError

    async def read_load(self, endpoint: Endpoint) -> Reading:
        raise NotImplementedError

    async def read(self, endpoint: Endpoint, path: str) -> bytes | None:
        raise NotImplementedError


def _discovery() -> Metrics:
    parts = _Parts("discovery")
    settings = DiscoverySettings.model_validate({"llm_backend_endpoints": "engine:8000"})
    Discovery(
        [endpoints_source(settings)],
        _NoProber(),
        bus=parts.bus,
        events=parts.events,
        metrics=parts.metrics,
        identity=parts.identity,
        policy=ProbePolicy(),
    )
    return parts.metrics


class _NoStore:
    """Fulfils the sidecar's port; never written."""

    async def open(self) -> None:
        raise NotImplementedError

    async def write(self, value: bytes) -> None:
        raise NotImplementedError

    async def withdraw(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def _register() -> Metrics:
    metrics = Metrics()
    settings = RegisterSettings.model_validate({"store": "redis", "engine": "engine:8000"})
    Registrar(settings.engines(), _NoProber(), _NoStore(), settings.encode, metrics, Timing(1, 1, 1, 1, 1))
    return metrics


def _mirror() -> Metrics:
    parts, live = _Parts("mirror"), LiveConfig(keeps=True)
    report = Report(parts.identity, parts.events, parts.metrics)
    writer, file = ConfigWriter(parts.bus, live, parts.events), MirrorFile(Path("mirror.json"))
    configuration = Configuration(parts.bus, live, writer, report, file, "docs")
    replay = Replay(
        parts.bus,
        ShadowClient(1),
        report,
        lambda: configuration.config,
        max_concurrency=1,
        request_timeout_s=1,
    )
    expose_config(live, parts.metrics)
    export(parts.metrics, configuration, replay)
    return parts.metrics


BUILDERS: tuple[tuple[str, Callable[[], Metrics]], ...] = (
    ("ingress", _ingress),
    ("ingress", _ingress_parent),
    ("ingress", ingress_tls),
    ("scheduler", _scheduler),
    ("discovery", _discovery),
    ("mirror", _mirror),
    ("register", _register),
)


def families() -> dict[str, tuple[FamilySnapshot, list[str]]]:
    """Name to the metric and the services that export it, in order of name."""
    found: dict[str, tuple[FamilySnapshot, list[str]]] = {}
    for service, build in BUILDERS:
        for family in build().declared():
            services = found.setdefault(family.name, (family, []))[1]
            if service not in services:
                services.append(service)
    return dict(sorted(found.items()))
