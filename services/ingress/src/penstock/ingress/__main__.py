"""`penstock ingress`: the parent process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from penstock.common.adapters.probes import AdminListener
from penstock.common.lifecycle import Lifecycle, run_service
from penstock.common.settings import exit_with_faults, load_or_exit
from penstock.common.telemetry import configure_logging
from penstock.ingress.adapters.listening import reserve_port
from penstock.ingress.parent import Parent
from penstock.ingress.settings import IngressSettings

PROG = "penstock ingress"


def main(argv: Sequence[str] | None = None) -> int:
    """Run an ingress until it is told to stop; the exit code."""
    settings = load_or_exit(IngressSettings, argv, prog=PROG)
    configure_logging("ingress", settings.log_level)
    return run_service(lambda: serve(settings))


async def serve(settings: IngressSettings) -> None:
    """Hold the port, start the workers, answer probes."""
    try:
        held = reserve_port(settings.host, settings.port)
    except OSError as exc:
        fault = f"--port {settings.port}: cannot listen on {settings.host}: {exc.strerror or exc}"
        exit_with_faults(PROG, [f"{fault}; choose another port"])
    with held:
        lifecycle = Lifecycle()
        parent = Parent(settings, held.getsockname()[1], lifecycle)
        admin = AdminListener(settings.admin_host, settings.admin_port, lifecycle.missing, parent.snapshot)
        try:
            await admin.start()
        except OSError as exc:
            exit_with_faults(
                PROG, [f"--admin-port {settings.admin_port}: {exc.strerror or exc}; choose another port"]
            )
        try:
            await lifecycle.run(parent.drain)
        finally:
            await admin.close()


if __name__ == "__main__":
    sys.exit(main())
