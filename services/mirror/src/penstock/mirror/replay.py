"""Copies out of the stream, each to the shadow once, a bounded number at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from penstock.common.bus import Bus
from penstock.common.messages import MirrorCopy, MirrorPrimary
from penstock.common.mirroring import MirrorConfig
from penstock.common.subjects import COPIES, MIRROR, MIRROR_PRIMARY
from penstock.mirror.comparison import Comparisons
from penstock.mirror.ports import Shadow, ShadowFailed
from penstock.mirror.report import Report
from penstock.mirror.shadow_request import UnusableCopy, shadow_request

log = logging.getLogger(__name__)


class Replay:
    """Takes a copy only when there are hands for it: what comes faster than the shadow answers waits in the
    stream, and leaves it by its bounds."""

    def __init__(
        self,
        bus: Bus,
        shadow: Shadow,
        report: Report,
        config: Callable[[], MirrorConfig],
        *,
        max_concurrency: int,
        request_timeout_s: float,
    ) -> None:
        """`config` gives the configuration of the moment."""
        self._bus, self._shadow, self._report, self._config = bus, shadow, report, config
        self._request_timeout_s, self._max = request_timeout_s, max_concurrency
        self._hands = asyncio.Semaphore(max_concurrency)
        self.under_way: set[asyncio.Task[None]] = set()
        self.comparisons = Comparisons()
        # Copies that the stream could not keep until somebody had hands for them, of all replicas.
        self.left = 0
        self._draining = False

    async def run(self) -> None:
        """Take and replay: a loop of the service."""
        await self._bus.subscribe(MIRROR_PRIMARY, self._on_primary)
        async with contextlib.aclosing(self._bus.take(COPIES, MIRROR)) as copies:
            while not self._draining:
                await self._hands.acquire()
                taken = await anext(copies)
                self.left = taken.left
                task = asyncio.create_task(self._replay(taken.message), name=f"copy {taken.message.id}")
                self.under_way.add(task)
                task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        self._hands.release()
        if not task.cancelled() and (fault := task.exception()):
            log.error("replaying a copy failed", exc_info=fault)

    async def drain(self, timeout_s: float) -> None:
        """Take no more, let what is under way end, then end it."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        # One more copy can come that was asked for before.
        while self.under_way and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait(self.under_way, timeout=left_s)
        for task in list(self.under_way):
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)

    async def _replay(self, copy: MirrorCopy) -> None:
        config, started_at = self._config(), time.monotonic()
        if not config.active:
            self._report.not_sent(copy, "dropped", "disabled", "", 0.0)
            return
        timeout_s = config.Timeout / 1000 or self._request_timeout_s
        try:
            figures = await self._shadow.send(shadow_request(copy, config), timeout_s)
        except UnusableCopy as exc:
            self._report.not_sent(copy, "dropped", exc.reason, "", 0.0)
        except TimeoutError:
            detail = f"no whole response within {timeout_s:g} s"
            self._report.not_sent(copy, "timed_out", "timeout", detail, _ms_since(started_at))
        except ShadowFailed as exc:
            self._report.not_sent(copy, "failed", exc.reason, exc.detail, _ms_since(started_at))
        else:
            self._report.sent(copy, figures)
            if copy.compared and (event := self.comparisons.shadow(copy, figures)):
                self._report.compared(event)

    def _on_primary(self, primary: MirrorPrimary) -> None:
        if event := self.comparisons.primary(primary):
            self._report.compared(event)


def _ms_since(moment: float) -> float:
    return int((time.monotonic() - moment) * 1e6) / 1000
