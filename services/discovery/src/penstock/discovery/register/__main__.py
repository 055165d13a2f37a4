"""`penstock register`, `python -m penstock.discovery.register`: settings, adapters, run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from penstock.common.adapters.probes import AdminListener, local
from penstock.common.lifecycle import Lifecycle, run_service
from penstock.common.settings import exit_with_faults, load_or_exit, unknown_variables
from penstock.common.telemetry import Metrics, configure_logging
from penstock.discovery.adapters.prober import http_prober
from penstock.discovery.register import settings as stores
from penstock.discovery.register.ports import Store
from penstock.discovery.register.service import Registrar, Timing
from penstock.discovery.register.settings import RegisterSettings

log = logging.getLogger(__name__)

PROG = "penstock register"
CLOSE_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sidecar until it is told to stop; the exit code."""
    settings = load_or_exit(RegisterSettings, argv, prog=PROG)
    return run_service(lambda: _serve(settings))


# Each imports its adapter when it is used: a client library costs memory that other stores need not pay.
def _redis(settings: RegisterSettings, metrics: Metrics) -> Store:
    from penstock.discovery.register.adapters.redis_store import redis_store

    return redis_store(settings)


def _etcd(settings: RegisterSettings, metrics: Metrics) -> Store:
    from penstock.discovery.register.adapters.etcd_store import etcd_store

    return etcd_store(settings)


def _nats(settings: RegisterSettings, metrics: Metrics) -> Store:
    from penstock.discovery.register.adapters.nats_store import nats_store

    return nats_store(settings, metrics)


STORES: Mapping[str, Callable[[RegisterSettings, Metrics], Store]] = {
    stores.REDIS: _redis,
    stores.ETCD: _etcd,
    stores.NATS: _nats,
}


async def _serve(settings: RegisterSettings) -> None:
    configure_logging("register", settings.log_level)
    for name in unknown_variables([RegisterSettings]):
        log.warning("environment variable %s is not a setting of this process", name)
    if settings.only_local:
        log.info("engines are registered at a loopback address, for this machine alone: see --advertise-host")
    metrics, lifecycle = Metrics(), Lifecycle()
    store = STORES[settings.store](settings, metrics)
    api_key = settings.engine_api_key.get_secret_value()
    async with http_prober(settings.probe_timeout, api_key, settings.engine_tls()) as prober:
        timing = Timing(
            settings.probe_interval,
            settings.heartbeat_interval,
            settings.store_timeout,
            settings.probe_rise,
            settings.probe_fall,
        )
        registrar = Registrar(settings.engines(), prober, store, settings.encode, metrics, timing)
        lifecycle.require("registration", registrar.missing)
        for name, loop in registrar.loops():
            lifecycle.add_loop(name, loop)
        admin = AdminListener(
            settings.admin_host,
            settings.admin_port,
            lifecycle.missing,
            local(metrics.snapshot),
            metrics_token=settings.metrics_token.get_secret_value(),
        )
        await _listen(admin, settings, lifecycle)
        try:
            await store.open()
            await lifecycle.run(lambda: registrar.withdraw(settings.drain_timeout))
        finally:
            # A store that does not answer is left, not waited for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await store.close()
            await admin.close()


async def _listen(admin: AdminListener, settings: RegisterSettings, lifecycle: Lifecycle) -> None:
    host, port = settings.admin_host, settings.admin_port
    try:
        await admin.start()
    except OSError as exc:
        lifecycle.abandon()
        why = exc.strerror or exc
        exit_with_faults(PROG, [f"--admin-port {port}: cannot listen on {host}: {why}; choose another port"])
    log.info("admin listener on http://%s:%d", host, admin.port)


if __name__ == "__main__":
    raise SystemExit(main())
