"""`penstock tap`: follow the routing log, for people or as JSON lines."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Literal

from pydantic import Field, field_validator

from penstock.cli import event_lines
from penstock.cli.durations import seconds_of
from penstock.cli.event_lines import BrokenEvent
from penstock.cli.gaps import GapTracker, parse_range
from penstock.cli.terminal import RED, paint, plain, wants_colour, when_nobody_reads
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.bus import Bus, Stored
from penstock.common.event_batches import INCARNATION, SEQUENCE, WRITER
from penstock.common.identity import new_identity
from penstock.common.settings import BusSettings, load_or_exit
from penstock.common.subjects import EVENTS, event_filter
from penstock.common.telemetry import Metrics

PROG = "penstock tap"

EventType = Literal[
    "placement",
    "rejection",
    "outcome",
    "route",
    "retry",
    "fallback",
    "queued",
    "breaker",
    "instance",
    "degraded",
    "config",
    "mirrored",
    "comparison",
    "admitted",
    "gap",
    "writer",
]

with warnings.catch_warnings():
    # pydantic warns that `json` hides a deprecated method of its base, which nothing calls.
    warnings.simplefilter("ignore", UserWarning)

    class TapSettings(BusSettings):
        """Follow the routing events: placements, rejections, outcomes, and what happens to the fleet."""

        model: str = Field("", description="only events of this model")
        type: EventType | None = Field(None, description="only events of this type")
        since: float | None = Field(
            None, description="start with the events of this long ago, as in 30s, 10m, 2h or 1d"
        )
        json: bool = Field(False, description="print one CloudEvent a line")  # type: ignore[assignment]  # the flag is --json
        count: int = Field(0, ge=0, description="end after this many events; 0 goes on")

        @field_validator("since", mode="before")
        @classmethod
        def _seconds(cls, value: object) -> object:
            return None if value is None else seconds_of(str(value))


def main(argv: Sequence[str] | None = None) -> int:
    """Follow until SIGINT, SIGTERM, `--count`, or nobody reads; then a summary on stderr."""
    settings = load_or_exit(TapSettings, argv, prog=PROG)
    logging.basicConfig(level=logging.WARNING, format=f"{PROG}: %(message)s", stream=sys.stderr)
    tap = Tap(settings, lambda line: print(line, flush=True), wants_colour(sys.stdout))
    try:
        asyncio.run(_run(settings, tap))
    except BrokenPipeError:
        # What Python would still write at its end goes nowhere, without a complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(tap.summary(), file=sys.stderr)
    return 0


async def _run(settings: TapSettings, tap: Tap) -> None:
    bus = NatsBus(settings, new_identity("tap").writer, Metrics())
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    when_nobody_reads(sys.stdout.fileno(), stop.set)
    await bus.start()
    follow = asyncio.create_task(tap.follow(bus), name="follow")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait([follow, stopped], return_when=asyncio.FIRST_COMPLETED)
        if follow.done():
            follow.result()
    finally:
        for task in (follow, stopped):
            task.cancel()
        await asyncio.gather(follow, stopped, return_exceptions=True)
        await bus.close()


class Tap:
    """Messages of the stream become lines; what is broken or missing is said and counted."""

    def __init__(self, settings: TapSettings, show: Callable[[str], None], colour: bool) -> None:
        self._settings, self._show, self._colour = settings, show, colour
        self._counts: Counter[str] = Counter()
        self._broken = 0
        # A filter hides messages of every writer, so that missing numbers mean nothing.
        self._gaps = None if settings.type or settings.model else GapTracker()

    async def follow(self, bus: Bus) -> None:
        """Show events until there were `--count`."""
        wanted = event_filter(self._settings.type or "", self._settings.model)
        async with aclosing(bus.follow(EVENTS, wanted, self._settings.since)) as messages:
            async for message in messages:
                if self.take(message):
                    return

    def take(self, message: Stored) -> bool:
        """Show one message's events; True if that was the last one wanted."""
        self._check_range(message)
        try:
            events = event_lines.split(message.headers, message.payload)
        except BrokenEvent as exc:
            self._note_broken(message, exc)
            return False
        for raw in events:
            try:
                self._show_event(raw)
            except BrokenEvent as exc:
                self._note_broken(message, exc)
            if self._settings.count and self._counts.total() >= self._settings.count:
                return True
        return False

    def summary(self) -> str:
        """How many of each type there were."""
        parts = [f"{count} {kind}" for kind, count in sorted(self._counts.items())]
        parts += [f"{self._broken} broken"] if self._broken else []
        parts += [f"{self._gaps.missing} missing"] if self._gaps and self._gaps.missing else []
        total = self._counts.total()
        return f"{total} event{'' if total == 1 else 's'}" + (f": {', '.join(parts)}" if parts else "")

    def _show_event(self, raw: bytes) -> None:
        event = event_lines.parse(raw)
        line = (
            event_lines.as_json_line(raw) if self._settings.json else event_lines.as_text(event, self._colour)
        )
        self._counts[plain(event.kind)] += 1
        self._show(line)

    def _check_range(self, message: Stored) -> None:
        held = parse_range(message.headers.get(SEQUENCE, ""))
        if self._gaps is None or held is None:
            return
        writer, incarnation = message.headers.get(WRITER, ""), message.headers.get(INCARNATION, "")
        gap = self._gaps.see(writer, incarnation, *held)
        if gap is not None:
            self._remark(f"gap: events {gap[0]}-{gap[1]} of {writer}/{incarnation} are missing")

    def _note_broken(self, message: Stored, exc: BrokenEvent) -> None:
        self._broken += 1
        self._remark(f"broken: message {message.sequence} on {message.subject}: {exc}")

    def _remark(self, text: str) -> None:
        """A line about the log, not of it: beside the JSON, among the text."""
        if self._settings.json:
            print(f"{PROG}: {plain(text)}", file=sys.stderr)
        else:
            self._show(paint(f"-- {plain(text)}", RED if self._colour else ""))


if __name__ == "__main__":
    sys.exit(main())
