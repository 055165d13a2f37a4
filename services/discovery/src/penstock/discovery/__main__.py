"""`python -m penstock.discovery`: settings, adapters, run."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.adapters.host import Host
from penstock.common.identity import new_identity
from penstock.common.lifecycle import run_service
from penstock.common.settings import load_or_exit
from penstock.discovery.adapters.prober import http_prober
from penstock.discovery.adapters.static_source import StaticSource
from penstock.discovery.endpoints import parse_endpoints
from penstock.discovery.service import Discovery
from penstock.discovery.settings import DiscoverySettings
from penstock.discovery.source_keeper import ProbePolicy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop; the exit code."""
    settings = load_or_exit(DiscoverySettings, argv, prog="penstock discovery")
    return run_service(lambda: _serve(settings))


async def _serve(settings: DiscoverySettings) -> None:
    host = Host(new_identity("discovery", settings.discovery_id), settings)
    source = StaticSource(settings.source, parse_endpoints(settings.llm_backend_endpoints))
    async with http_prober(settings.probe_timeout, settings.engine_api_key.get_secret_value()) as prober:
        discovery = Discovery(
            [source],
            prober,
            bus=host.bus,
            events=host.events,
            metrics=host.metrics,
            identity=host.identity,
            policy=ProbePolicy(
                settings.probe_interval, settings.probe_rise, settings.probe_fall, settings.probe_concurrency
            ),
        )
        host.lifecycle.require("registry", discovery.missing)
        for name, loop in discovery.loops():
            host.lifecycle.add_loop(name, loop)
        await host.run(discovery.drain, host.admin_listener())


if __name__ == "__main__":
    raise SystemExit(main())
