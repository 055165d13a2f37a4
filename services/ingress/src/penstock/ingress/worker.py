"""One ingress process behind the shared port: `python -m penstock.ingress.worker CHANNEL_FD`.

The parent sends settings, address and identity over the channel, then asks for snapshots; when the
channel ends, the worker drains.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import time

import msgspec

from penstock.common.adapters.host import Host
from penstock.common.identity import new_identity
from penstock.common.instances import InstanceTable
from penstock.common.lifecycle import run_service
from penstock.common.telemetry import FamilySnapshot
from penstock.ingress.access_log import AccessLog
from penstock.ingress.adapters.channel import Channel
from penstock.ingress.adapters.engine_client import EngineClient
from penstock.ingress.adapters.http_server import HttpServer
from penstock.ingress.adapters.listening import listening_socket
from penstock.ingress.gateway import Gateway
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.placing import Placer
from penstock.ingress.service import IngressService
from penstock.ingress.settings import IngressSettings

# What clients get to take their last bytes, however little the drain has left.
FLUSH_S = 1.0


class Start(msgspec.Struct):
    """What a worker is told first; `settings` holds the secrets too."""

    settings: dict[str, str | int | float | bool | None]
    id: str
    port: int


class Report(msgspec.Struct):
    """What a worker answers: why it is not ready, and its metrics."""

    missing: list[str]
    snapshot: list[FamilySnapshot]


def main() -> int:
    """Run until the channel or a signal says stop."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    return run_service(lambda: serve(channel))


async def serve(channel: Channel) -> None:
    """Assemble one worker and run it."""
    await channel.open()
    start = await channel.receive(Start)
    if start is None:
        return
    settings = IngressSettings.model_validate(start.settings)
    host = Host(new_identity("ingress", start.id), settings)
    table = InstanceTable()
    account = InFlightAccount(host.identity.id, host.identity.incarnation)
    gateway = Gateway(
        settings,
        host.identity,
        table,
        account,
        host.events,
        AccessLog(settings.access_log, _write_stderr),
        host.metrics,
        time.monotonic,
    )
    gateway.upstreams = upstreams = EngineClient(settings, host.metrics)
    gateway.placer = placer = Placer(
        host.bus, table, account, host.events, host.identity, host.metrics, settings.schedule_timeout
    )
    service = IngressService(gateway, host.bus, host.lifecycle, host.metrics)
    server = HttpServer(gateway, host.metrics)

    async def answer_parent() -> None:
        while await channel.receive(str) is not None:
            await channel.send(Report(host.lifecycle.missing(), host.metrics.snapshot()))
        host.lifecycle.stopping.set()
        await asyncio.Event().wait()

    async def drain() -> None:
        gateway.draining = True
        server.stop_accepting()
        deadline = time.monotonic() + settings.drain_timeout
        await service.drain(settings.drain_timeout)
        await placer.close()
        await upstreams.close()
        await server.close(max(FLUSH_S, deadline - time.monotonic()))

    # Requests leave no cycles behind; the default thresholds would walk all live objects for nothing.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    await server.listen(listening_socket(settings.host, start.port))
    for name, loop in (
        ("registry-watch", service.watch()),
        ("load-report", service.report()),
        ("sweep", service.sweep((server, upstreams), time.monotonic)),
        ("parent", answer_parent()),
    ):
        host.lifecycle.add_loop(name, loop)
    await host.run(drain, None)


def _write_stderr(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()


if __name__ == "__main__":
    raise SystemExit(main())
