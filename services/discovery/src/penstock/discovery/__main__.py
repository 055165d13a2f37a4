"""`python -m penstock.discovery`: settings, adapters, run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from penstock.common.adapters.host import Host
from penstock.common.bus import Bus
from penstock.common.identity import new_identity
from penstock.common.lifecycle import run_service
from penstock.common.settings import load_or_exit
from penstock.discovery import settings as names
from penstock.discovery.adapters.prober import http_prober
from penstock.discovery.kv_targets import KvTarget
from penstock.discovery.ports import KvPublisher, KvPublishers, Source
from penstock.discovery.service import Discovery
from penstock.discovery.settings import DiscoverySettings
from penstock.discovery.surroundings import ProbePolicy, Timing


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop; the exit code."""
    settings = load_or_exit(DiscoverySettings, argv, prog="penstock discovery")
    return run_service(lambda: _serve(settings))


# Each imports its adapter when it is used: a client library costs memory that other sources need not pay.
def _endpoints(settings: DiscoverySettings, bus: Bus) -> Source:
    from penstock.discovery.adapters.static_source import endpoints_source

    return endpoints_source(settings)


def _redis(settings: DiscoverySettings, bus: Bus) -> Source:
    from penstock.discovery.adapters.redis_source import redis_source

    return redis_source(settings, settings.allowed)


def _etcd(settings: DiscoverySettings, bus: Bus) -> Source:
    from penstock.discovery.adapters.etcd_source import etcd_source

    return etcd_source(settings)


def _kubernetes(settings: DiscoverySettings, bus: Bus) -> Source:
    from penstock.discovery.adapters.kubernetes_source import kubernetes_source

    return kubernetes_source(settings, settings.allowed)


def _nats(settings: DiscoverySettings, bus: Bus) -> Source:
    from penstock.discovery.adapters.nats_source import nats_source

    return nats_source(settings, bus)


SOURCES: Mapping[str, Callable[[DiscoverySettings, Bus], Source]] = {
    names.ENDPOINTS: _endpoints,
    names.REDIS: _redis,
    names.ETCD: _etcd,
    names.KUBERNETES: _kubernetes,
    names.NATS: _nats,
}


class _Publishers:
    """Fulfils `KvPublishers`; imports its adapter for the first publisher, as the sources do."""

    def __init__(self, settings: DiscoverySettings, outside: AsyncExitStack) -> None:
        self._allowed, self._outside = settings.allowed, outside
        self._real: KvPublishers | None = None

    async def connect(self, target: KvTarget) -> KvPublisher:
        """See `KvPublishers`."""
        if self._real is None:
            from penstock.discovery.adapters.zmq_events import zmq_publishers

            self._real = self._outside.enter_context(zmq_publishers(self._allowed))
        return await self._real.connect(target)


async def _serve(settings: DiscoverySettings) -> None:
    host = Host(new_identity("discovery", settings.discovery_id), settings)
    sources = [SOURCES[name](settings, host.bus) for name in settings.sources]
    tls = settings.engine_tls() if settings.engine_tls_ca else None
    key = settings.engine_api_key.get_secret_value()
    async with AsyncExitStack() as outside:
        prober = await outside.enter_async_context(
            http_prober(settings.probe_timeout, key, tls, allowed=settings.allowed)
        )
        discovery = Discovery(
            sources,
            prober,
            bus=host.bus,
            events=host.events,
            metrics=host.metrics,
            identity=host.identity,
            policy=ProbePolicy(
                settings.probe_interval,
                settings.probe_rise,
                settings.probe_fall,
                settings.probe_concurrency,
                settings.probe_flap_window,
            ),
            timing=Timing(forget_source_s=settings.discovery_forget_source_after),
            allowed=settings.allowed,
            kv_publishers=None if settings.kv_events == "off" else _Publishers(settings, outside),
            kv_policy=settings.kv_policy,
        )
        host.lifecycle.require("registry", discovery.missing)
        for name, loop in discovery.loops():
            host.lifecycle.add_loop(name, loop)
        try:
            await host.run(discovery.drain, host.admin_listener())
        finally:
            await discovery.close()


if __name__ == "__main__":
    raise SystemExit(main())
