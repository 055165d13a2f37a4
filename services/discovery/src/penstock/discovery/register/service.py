"""The loops of the sidecar: probe each engine, and keep what the store holds in line with what is healthy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from penstock.common.model import Instance
from penstock.common.records import RecordError
from penstock.common.telemetry import Metrics
from penstock.discovery.register.engines import MAX_NAMES_BYTES, LocalEngine, Watched, parse_server_info
from penstock.discovery.register.ports import Prober, Store, StoreError

log = logging.getLogger(__name__)

# SGLang's, by its present name and its former one.
INFO_PATHS = "/server_info", "/get_server_info"
# An engine that failed once is asked again soon, so that `fall` failures take no longer than they must.
RECHECK_S = 0.25
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0

# (healthy instances, now in ms since 1970) -> the record; raises RecordError
Encode = Callable[[tuple[Instance, ...], int], bytes]


@dataclass(frozen=True)
class Timing:
    """How often things are done, and how long they may take, in seconds; `rise` and `fall` count probes."""

    probe_s: float = 1.0
    heartbeat_s: float = 10.0
    store_timeout_s: float = 5.0
    rise: int = 1
    fall: int = 2


class Registrar:
    """Keeps one registration: written while an engine is healthy, withdrawn when none is or on leaving."""

    def __init__(
        self,
        engines: Iterable[LocalEngine],
        prober: Prober,
        store: Store,
        encode: Encode,
        metrics: Metrics,
        timing: Timing,
        *,
        wall: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
    ) -> None:
        """`encode` makes the record; `wall` stamps it, `rng` gives numbers in 0..1 that spread the waits."""
        engines = tuple(engines)
        share = MAX_NAMES_BYTES // max(1, len(engines))
        self._watched = [Watched(engine, timing.rise, timing.fall, share) for engine in engines]
        self._prober, self._store, self._encode = prober, store, encode
        self._timing, self._wall, self._rng = timing, wall, rng
        self._moved, self._settled = asyncio.Event(), asyncio.Event()
        self._leaving = False
        # What the store was last seen to hold; None until it has answered once.
        self._standing: tuple[Instance, ...] | None = None
        self._trouble = ""
        self._export(metrics)

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The eternal loops, by name."""
        for watched in self._watched:
            yield f"engine {watched.engine.probe}", self._follow(watched)
        yield "registration", self._keep_registered()

    def missing(self) -> str:
        """What keeps the engines from being registered; empty when all that are healthy are."""
        if self._trouble:
            return self._trouble
        sick = [f"{one.engine.probe}: {one.reason}" for one in self._watched if one.healthy is False]
        if len(sick) == len(self._watched):
            return "no engine is healthy: " + "; ".join(sick)
        return "" if self._standing == self._wanted() else "the engines are not registered yet"

    async def withdraw(self, within_s: float) -> None:
        """Take the registration out of the store, trying until the time is over; then it ends by itself."""
        self._leaving = True
        if not self._standing:
            return
        self._settled.clear()
        self._moved.set()
        try:
            async with asyncio.timeout(within_s):
                while self._standing:
                    await self._settled.wait()
                    self._settled.clear()
        except TimeoutError:
            log.warning("the registration is not withdrawn and will expire: %s", self._trouble or "no answer")

    def _wanted(self) -> tuple[Instance, ...]:
        if self._leaving:
            return ()
        return tuple(record for one in self._watched if (record := one.record) is not None)

    async def _follow(self, watched: Watched) -> None:
        pause_s = self._timing.probe_s
        while True:
            before, was_healthy = watched.record, watched.healthy
            watched.judge(await self._prober.check(watched.engine.probe))
            if watched.asks_for_info:
                await self._ask_for_info(watched)
            if watched.healthy is not was_healthy:
                _tell(watched)
            if watched.record != before or was_healthy is None:
                self._moved.set()
            waits_s = min(pause_s, RECHECK_S) if watched.bad and watched.healthy else pause_s
            await asyncio.sleep(waits_s * (0.8 + 0.2 * self._rng()))

    async def _ask_for_info(self, watched: Watched) -> None:
        for path in INFO_PATHS:
            watched.info = parse_server_info(await self._prober.read(watched.engine.probe, path))
            if watched.info is not None:
                return

    async def _keep_registered(self) -> None:
        failures = 0
        while True:
            # A predecessor's record stays as it is until every engine has been asked once.
            if any(one.healthy is None for one in self._watched):
                await self._moved.wait()
                self._moved.clear()
                continue
            self._moved.clear()
            await self._tell_store(self._wanted())
            self._settled.set()
            failures = failures + 1 if self._trouble else 0
            pause_s = self._timing.heartbeat_s
            if failures:
                pause_s = min(pause_s, RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(failures, 16))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s * (0.8 + 0.2 * self._rng())):
                    await self._moved.wait()

    async def _tell_store(self, wanted: tuple[Instance, ...]) -> None:
        """Write, or withdraw: also again and again, since a store may come back with an old record."""
        try:
            async with asyncio.timeout(self._timing.store_timeout_s):
                if wanted:
                    await self._store.write(self._encode(wanted, int(self._wall() * 1000)))
                else:
                    await self._store.withdraw()
        except (StoreError, RecordError, TimeoutError) as exc:
            why = str(exc) or f"the store did not answer within {self._timing.store_timeout_s:g} s"
            self._writes.inc("failed")
            if not self._trouble:
                log.warning("the store is not written, trying again: %s", why)
            self._trouble = why
            return
        if self._trouble:
            log.info("the store is written again")
        self._trouble = ""
        self._writes.inc("written" if wanted else "withdrawn")
        if {one.id for one in wanted} != {one.id for one in self._standing or ()}:
            message = "registered" if wanted else "withdrawn"
            log.info(message, extra={"fields": {"instances": [one.id for one in wanted]}})
        self._standing = wanted

    def _export(self, metrics: Metrics) -> None:
        def engines() -> list[tuple[tuple[str, ...], float]]:
            words = {None: "unknown", True: "healthy", False: "unhealthy"}
            counted = Counter(words[one.healthy] for one in self._watched)
            return [((state,), float(counted[state])) for state in words.values()]

        metrics.gauge("penstock_register_engines", "Engines beside this sidecar", engines, "state")
        metrics.gauge(
            "penstock_register_registered",
            "Instances that stand in the store, as last written",
            lambda: float(len(self._standing or ())),
        )
        self._writes = metrics.counter(
            "penstock_register_writes_total",
            "Heartbeats to the store: written, withdrawn (no engine is healthy), failed",
            "result",
        )


def _tell(watched: Watched) -> None:
    fields = {"engine": str(watched.engine.probe), "reason": watched.reason}
    log.log(
        logging.INFO if watched.healthy else logging.WARNING,
        "engine is healthy" if watched.healthy else "engine is not healthy",
        extra={"fields": fields},
    )
