"""`python -m penstock.scheduler`: one scheduler replica."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.adapters.host import Host
from penstock.common.identity import new_identity
from penstock.common.lifecycle import run_service
from penstock.common.settings import load_or_exit
from penstock.scheduler.service import SchedulerService
from penstock.scheduler.settings import SchedulerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; the exit code."""
    settings = load_or_exit(SchedulerSettings, argv, prog="penstock scheduler")

    async def serve() -> None:
        identity = new_identity("scheduler", settings.scheduler_id)
        host = Host(identity, settings)
        service = SchedulerService(host.bus, identity, host.events, host.metrics, host.lifecycle, settings)
        await service.start()
        await host.run(service.drain, host.admin_listener())

    return run_service(serve)


if __name__ == "__main__":
    raise SystemExit(main())
