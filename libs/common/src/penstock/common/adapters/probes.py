"""The admin listener: /livez, /readyz, /metrics (aiohttp; the text format is prometheus-client's)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from penstock.common.telemetry import FamilySnapshot, Snapshot

# Of requests to an admin API: a value of live configuration, and a byte to tell that it is over.
MAX_BODY_BYTES = 256 * 1024 + 1
GetSnapshot = Callable[[], Awaitable[Snapshot]]


class AdminListener:
    """Serves probes and metrics; routes of an admin API can be added to `app` before `start`."""

    def __init__(
        self,
        host: str,
        port: int,
        missing: Callable[[], list[str]],
        snapshot: GetSnapshot,
        *,
        metrics_token: str = "",
    ) -> None:
        """/metrics asks for `metrics_token` if there is one."""
        self._host, self._port, self._missing, self._snapshot = host, port, missing, snapshot
        self._metrics_token = metrics_token
        self.app = web.Application(client_max_size=MAX_BODY_BYTES)
        self.app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=1)
        self.port = port

    async def start(self) -> None:
        """Listen. Raises OSError if the port is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _livez(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _readyz(self, request: web.Request) -> web.Response:
        missing = self._missing()
        if missing:
            return web.json_response({"status": "not ready", "missing": missing}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics(self, request: web.Request) -> web.Response:
        if self._metrics_token and not _bears(request, self._metrics_token):
            error = {
                "message": "/metrics needs its token: authorization: Bearer ...",
                "param": "authorization",
            }
            error |= {"type": "authentication_error", "code": "invalid_metrics_token"}
            return web.json_response({"error": error}, status=401, headers={"www-authenticate": "Bearer"})
        text = generate_latest(_registry(await self._snapshot()))
        return web.Response(body=text, headers={"content-type": CONTENT_TYPE_LATEST})


def _bears(request: web.Request, token: str) -> bool:
    """Whether the request shows the token; the time that it takes does not tell how much of it is right."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digests = [
        hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given.strip(), token)
    ]
    return scheme.lower() == "bearer" and hmac.compare_digest(*digests)


def local(snapshot: Callable[[], Snapshot]) -> GetSnapshot:
    """The snapshot of a service that is one process."""

    async def get() -> Snapshot:
        await asyncio.sleep(0)
        return snapshot()

    return get


def _registry(snapshot: Snapshot) -> CollectorRegistry:
    class Values(Collector):
        def collect(self) -> Iterator[Metric]:
            return map(_family, snapshot)

    registry = CollectorRegistry()
    registry.register(Values())
    return registry


def _family(family: FamilySnapshot) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.label_names)
        for sample in family.samples:
            buckets, running = [], 0
            for bound, count in zip((*map(str, family.bounds), "+Inf"), sample.counts, strict=True):
                running += count
                buckets.append((bound, float(running)))
            histogram.add_metric(sample.labels, buckets, sample.value)
        return histogram
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(family.name, family.help, labels=family.label_names)
    for sample in family.samples:
        metric.add_metric(sample.labels, sample.value)
    return metric
