"""`python -m penstock.mirror`: settings, adapters, run."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.adapters.host import Host
from penstock.common.identity import new_identity
from penstock.common.lifecycle import run_service
from penstock.common.settings import load_or_exit
from penstock.mirror.service import Mirror
from penstock.mirror.settings import MirrorSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop; the exit code."""
    settings = load_or_exit(MirrorSettings, argv, prog="penstock mirror")
    return run_service(lambda: _serve(settings))


async def _serve(settings: MirrorSettings) -> None:
    host = Host(new_identity("mirror", settings.mirror_id), settings)
    mirror = Mirror(host.bus)
    host.lifecycle.require("bus", mirror.missing)
    await host.run(mirror.drain, host.admin_listener())


if __name__ == "__main__":
    raise SystemExit(main())
