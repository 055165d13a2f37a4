"""One scheduler replica as a process."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

from penstock.common.adapters.host import VERSION, Host
from penstock.common.identity import new_identity
from penstock.common.lifecycle import run_service
from penstock.common.settings import load_or_exit
from penstock.common.tracing import Spans
from penstock.scheduler.service import SchedulerService
from penstock.scheduler.settings import SchedulerSettings
from penstock.scheduler.tracing import DecisionTraces

FLUSH_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; the exit code."""
    settings = load_or_exit(SchedulerSettings, argv, prog="penstock scheduler")

    async def serve() -> None:
        identity = new_identity("scheduler", settings.scheduler_id)
        host = Host(identity, settings)
        spans, export, traces = Spans(host.metrics), None, None
        if settings.otlp_endpoint:
            from penstock.common.adapters.otlp import OtlpExport

            export = OtlpExport(settings.otlp_endpoint, identity, VERSION, spans)
            traces = DecisionTraces(identity, spans, time.time_ns)
            host.lifecycle.add_loop("traces", export.run())
        service = SchedulerService(
            host.bus, identity, host.events, host.metrics, host.lifecycle, settings, traces=traces
        )
        await service.start()
        # Decisions leave no cycles behind; the default thresholds would walk all live objects for nothing.
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)

        async def drain() -> None:
            await service.drain()
            if export is not None:
                await export.close(FLUSH_S)

        await host.run(drain, host.admin_listener())

    return run_service(serve)
