"""One nats-py client, from connecting to discarding."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors
from nats.aio.client import Client

from penstock.common.settings import BusSettings

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2
CLOSE_TIMEOUT_S = 1
# A ping that is given up ends the client: nats-py stumbles over the late answer and reads no further.
# So no ping is, within the life of any connection; waiting for one has an end of its own.
PING_LIFE_S = 7 * 86400


class Link:
    """A connection that is used until `closed` is set or it stops answering, and never again."""

    def __init__(self) -> None:
        self.client = Client()
        self.closed = asyncio.Event()
        self._pings: set[asyncio.Task[None]] = set()

    async def connect(
        self,
        settings: BusSettings,
        server: str,
        name: str,
        on_slow: Callable[[nats.errors.SlowConsumerError], None],
    ) -> None:
        """Connect to `server`; raises whatever nats-py does, and it does not sort that out."""

        async def on_closed() -> None:
            self.closed.set()

        async def on_error(exc: Exception) -> None:
            if isinstance(exc, nats.errors.SlowConsumerError):
                on_slow(exc)
            else:
                log.debug("nats client: %r", exc)

        await self.client.connect(
            servers=[server],
            name=name,
            allow_reconnect=False,
            # The least that nats-py can do; else it keeps to a server that refuses for two minutes.
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=CONNECT_TIMEOUT_S,
            disconnected_cb=on_closed,
            closed_cb=on_closed,
            error_cb=on_error,
            ping_interval=PING_LIFE_S,
            **_credentials(settings),
        )

    def ping(self) -> asyncio.Task[None]:
        """Ends when the server has taken in all that was sent before, or fails; wait without cancelling."""
        task = asyncio.create_task(self.client.flush(timeout=PING_LIFE_S), name="nats-ping")
        self._pings.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, ping: asyncio.Task[None]) -> None:
        self._pings.discard(ping)
        if not ping.cancelled() and (exc := ping.exception()) is not None:
            log.debug("ping of the bus: %r", exc)

    async def answers(self, within_s: float) -> bool:
        """Whether a ping is answered in time."""
        ping = self.ping()
        await asyncio.wait({ping}, timeout=within_s)
        # A client whose reading has ended takes every ping for answered.
        reading = getattr(self.client, "_reading_task", None)
        return ping.done() and not ping.exception() and reading is not None and not reading.done()

    async def discard(self) -> None:
        """Close for good; a client whose server hangs is cut off, or its socket would stay open."""
        transport = getattr(
            getattr(getattr(self.client, "_transport", None), "_io_writer", None), "transport", None
        )
        await bounded(self.client.close(), CLOSE_TIMEOUT_S)
        if transport is not None:
            transport.abort()
        pings = list(self._pings)
        for ping in pings:
            ping.cancel()
        await asyncio.gather(*pings, return_exceptions=True)


async def bounded(work: Awaitable[None], seconds: float) -> None:
    """Await `work`, whose failure makes no difference, for so long."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except Exception as exc:  # noqa: BLE001  # the client is given up; what nats-py raises in any state is open
        log.debug("closing a bus client: %r", exc)


def _credentials(settings: BusSettings) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if settings.nats_user:
        options |= {"user": settings.nats_user, "password": settings.nats_password.get_secret_value()}
    if settings.nats_creds:
        options["user_credentials"] = str(settings.nats_creds)
    if settings.nats_tls_ca or settings.nats_tls_cert:
        ca = settings.nats_tls_ca
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        if settings.nats_tls_cert:
            context.load_cert_chain(str(settings.nats_tls_cert), str(settings.nats_tls_key))
        options["tls"] = context
    return options
