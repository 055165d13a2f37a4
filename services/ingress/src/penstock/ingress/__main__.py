"""`penstock ingress`: the parent process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache

from penstock.common.adapters.host import VERSION
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.adapters.probes import AdminListener
from penstock.common.adapters.routing_log import RoutingLog
from penstock.common.followed_file import read_bytes
from penstock.common.identity import Identity, new_identity
from penstock.common.lifecycle import Lifecycle, run_service
from penstock.common.live_config import expose_config
from penstock.common.routing_events import DEGRADED, DegradedEvent
from penstock.common.settings import exit_with_faults, load_or_exit, read_token
from penstock.common.telemetry import Metrics, configure_logging
from penstock.common.user_hashes import UserHashes
from penstock.ingress.adapters.admin_http import mount
from penstock.ingress.adapters.listening import reserve_port
from penstock.ingress.admin.access import Access
from penstock.ingress.admin.explaining import Hashing
from penstock.ingress.admin.service import AdminService, Division
from penstock.ingress.body_reader import tokenizer_of
from penstock.ingress.certificate_keeping import CertificateKeeper
from penstock.ingress.certificates import BadCertificates
from penstock.ingress.large_bodies import Setup
from penstock.ingress.parent import Parent
from penstock.ingress.settings import IngressSettings

log = logging.getLogger(__name__)

PROG = "penstock ingress"
FLUSH_S = 2.0


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
    try:
        certificates = settings.certificates()
    except BadCertificates as exc:
        # They could be used a moment ago.
        exit_with_faults(PROG, [str(exc)])
    with held:
        lifecycle = Lifecycle()
        identity = new_identity("ingress", settings.ingress_id)
        writer, metrics = f"{identity.writer}-admin", Metrics()
        bus = NatsBus(settings, writer, metrics)
        written = RoutingLog(
            bus, Identity("ingress", f"{identity.id}-admin", identity.incarnation), metrics, settings
        )
        events = written.events
        salt = settings.audit_user_salt.get_secret_value()
        users = UserHashes(salt) if salt else None
        access, division = Access(_token_of(settings)), _division_of(settings)
        api = AdminService(bus, events, access, _hashing_of(settings), users, division)
        parent = Parent(settings, identity.id, held.getsockname()[1], lifecycle, api.router.handle)
        expose_config(api.config, parent.metrics)
        if certificates is not None:

            def degraded(what: str, active: bool, cause: str) -> None:
                event = DegradedEvent(identity.service, identity.id, what, active, cause)
                events.emit(DEGRADED, "", identity.service, event)

            keeper = CertificateKeeper(certificates, settings.certificates, parent.metrics, degraded)
            parent.certificates = keeper
            lifecycle.add_loop("certificates", keeper.follow(parent.use))
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keeper.look)
        admin = AdminListener(
            settings.admin_host,
            settings.admin_port,
            lifecycle.missing,
            parent.snapshot,
            metrics_token=settings.metrics_token.get_secret_value(),
        )
        mount(admin.app, api.router.handle)
        try:
            await admin.start()
        except OSError as exc:
            lifecycle.abandon()
            exit_with_faults(
                PROG, [f"--admin-port {settings.admin_port}: {exc.strerror or exc}; choose another port"]
            )
        await bus.start()
        for name, loop in api.loops():
            lifecycle.add_loop(name, loop)
        for name, loop in written.loops():
            lifecycle.add_loop(name, loop)
        export = None
        if settings.otlp_endpoint:
            # Of all workers: what takes requests does not load it.
            from penstock.common.adapters.otlp import OtlpExport

            export = OtlpExport(settings.otlp_endpoint, identity, VERSION, parent.spans)
            lifecycle.add_loop("traces", export.run())

        async def drain() -> None:
            await parent.drain()
            await written.end(FLUSH_S)
            if export is not None:
                await export.close(FLUSH_S)

        try:
            await lifecycle.run(drain)
        finally:
            await bus.close()
            written.close()
            await admin.close()


def _hashing_of(settings: IngressSettings) -> Hashing:
    """As the workers hash; a tokenizer is loaded once it is needed."""
    setup = Setup(
        settings.block_hash_secret.get_secret_value(),
        settings.block_bytes,
        settings.tokenizer_path,
        settings.token_block_size,
    )
    return Hashing(setup, settings.block_hash_tenant, cache(lambda: tokenizer_of(setup)))


def _division_of(settings: IngressSettings) -> Division:
    """As the workers divide; the file is read for each request."""
    path = settings.profiles_file

    def profiles() -> bytes | str:
        try:
            return read_bytes(path) if path is not None else b""
        except OSError as exc:
            return exc.strerror or str(exc)

    return Division(settings.pd_disagg_protocol, settings.separate_pd_scheduling, profiles)


def _token_of(settings: IngressSettings) -> Callable[[], str]:
    """The admin API's token. A file is read again for each request, which are few; its last token counts
    while it cannot be read."""
    path = settings.admin_token_file
    held = read_token(path) if path else settings.admin_token.get_secret_value()

    def token() -> str:
        nonlocal held
        if path:
            try:
                held = read_token(path)
            except ValueError as exc:
                log.warning("--admin-token-file %s %s; the last token counts", path, exc)
        return held

    return token


if __name__ == "__main__":
    sys.exit(main())
