"""Keeps the public listener's certificate in step with its files, and tells when they cannot be used."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from penstock.common.telemetry import Metrics
from penstock.ingress.certificates import BadCertificates, Certificates

log = logging.getLogger(__name__)

WHAT = "the TLS certificate"
POLL_S = 0.5

Degraded = Callable[[str, bool, str], None]


class CertificateKeeper:
    """The last certificates that could be used."""

    def __init__(
        self,
        first: Certificates,
        read: Callable[[], Certificates | None],
        metrics: Metrics,
        degraded: Degraded,
    ) -> None:
        """`read` reads the files, and may take its time. Raises BadCertificates."""
        self.current = first
        self._read: Callable[[], Certificates | None] = read
        self._degraded = degraded
        self._fault = ""
        self._look = asyncio.Event()
        self._loads = metrics.counter(
            "penstock_ingress_tls_reloads_total",
            "TLS certificates that changed, by what became of them",
            "result",
        )
        metrics.gauge(
            "penstock_ingress_tls_stale",
            "1 while the TLS certificate's files cannot be used, and the last good ones count",
            lambda: float(bool(self._fault)),
        )

    def look(self) -> None:
        """Look at the files now."""
        self._look.set()

    async def follow(self, use: Callable[[Certificates], Awaitable[None]]) -> None:
        """An eternal loop: `use` gets each that is new. Files are taken once they have stood still from one
        look to the next: certificate and key are rarely replaced at the same moment."""
        seen: Certificates | str | None = self.current
        while True:
            await self._wait()
            found = await self._found()
            if found == seen:
                if isinstance(found, str):
                    self._refused(found)
                elif found is None or found == self.current:
                    self._good()
                else:
                    await self._try(found, use)
            seen = found

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(POLL_S):
                await self._look.wait()
        except TimeoutError:
            return
        self._look.clear()

    async def _found(self) -> Certificates | str | None:
        """What the files hold; in words why they cannot be read."""
        try:
            return await asyncio.to_thread(self._read)
        except BadCertificates as exc:
            return str(exc)

    async def _try(self, found: Certificates, use: Callable[[Certificates], Awaitable[None]]) -> None:
        try:
            found.context()
        except BadCertificates as exc:
            self._refused(str(exc))
            return
        self.current = found
        await use(found)
        self._loads.inc("used")
        log.info("%s was read again", WHAT)
        self._good()

    def _refused(self, fault: str) -> None:
        if fault == self._fault:
            return
        self._fault = fault
        self._loads.inc("refused")
        log.warning("%s cannot be used, the last good one counts", WHAT, extra={"fields": {"cause": fault}})
        self._degraded(WHAT, True, fault)

    def _good(self) -> None:
        if self._fault:
            self._fault = ""
            log.info("%s can be used again", WHAT)
            self._degraded(WHAT, False, "")
