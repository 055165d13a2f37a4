"""`python -m penstock.mirror`: settings, adapters, run."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.adapters.host import Host
from penstock.common.config_keeping import ConfigWriter
from penstock.common.identity import new_identity
from penstock.common.lifecycle import run_service
from penstock.common.live_config import LiveConfig, expose_config
from penstock.common.settings import load_or_exit
from penstock.common.telemetry import Metrics
from penstock.mirror.adapters.config_file import MirrorFile
from penstock.mirror.adapters.shadow_client import ShadowClient
from penstock.mirror.replay import Replay
from penstock.mirror.report import Report, expose
from penstock.mirror.service import Configuration
from penstock.mirror.settings import MirrorSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop; the exit code."""
    settings = load_or_exit(MirrorSettings, argv, prog="penstock mirror")
    return run_service(lambda: _serve(settings))


async def _serve(settings: MirrorSettings) -> None:
    host = Host(new_identity("mirror", settings.mirror_id), settings)
    live = LiveConfig(keeps=True)
    report = Report(host.identity, host.events, host.metrics)
    configuration = Configuration(
        host.bus,
        live,
        ConfigWriter(host.bus, live, host.events),
        report,
        MirrorFile(settings.mirror_config),
        host.identity.writer,
    )
    shadow = ShadowClient(settings.mirror_max_concurrency)
    replay = Replay(
        host.bus,
        shadow,
        report,
        lambda: configuration.config,
        max_concurrency=settings.mirror_max_concurrency,
        request_timeout_s=settings.request_timeout,
    )
    expose_config(live, host.metrics)
    export(host.metrics, configuration, replay)
    host.lifecycle.require("bus", lambda: "" if host.bus.connected else "no connection")

    async def drain() -> None:
        await replay.drain(settings.drain_timeout)
        await shadow.close()

    for name, loop in (
        ("config", configuration.follow()),
        ("config-file", configuration.watch_file()),
        ("replay", replay.run()),
    ):
        host.lifecycle.add_loop(name, loop)
    await host.run(drain, host.admin_listener())


def export(metrics: Metrics, configuration: Configuration, replay: Replay) -> None:
    """The mirror's own gauges and counters."""
    expose(
        metrics,
        {
            "active": ("1 while requests are to be copied", lambda: float(configuration.config.active)),
            "file_fault": ("1 while the file cannot be used", lambda: float(bool(configuration.file_fault))),
            "under_way": ("Copies under way to the shadow", lambda: float(len(replay.under_way))),
        },
    )
    metrics.tally(
        "penstock_mirror_copies_left_total",
        "Copies that left the stream before a replica had hands for them; all replicas show the same",
        lambda: float(replay.left),
    )
    metrics.tally(
        "penstock_mirror_comparisons_given_up_total",
        "Shadows whose own request's end was not heard of",
        lambda: float(replay.comparisons.given_up),
    )


if __name__ == "__main__":
    raise SystemExit(main())
