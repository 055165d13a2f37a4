"""Settings and loop of `penstock top`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence

import msgspec
from pydantic import Field

from penstock.cli.bus_connection import connected
from penstock.cli.terminal import wants_colour, when_nobody_reads
from penstock.cli.top.display import Display, quit_key, resized
from penstock.cli.top.fleet import Fleet
from penstock.cli.top.frame import frame
from penstock.cli.top.sources import Reading
from penstock.cli.top.view import View
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.errors import BusUnavailable
from penstock.common.settings import BusSettings, load_or_exit

PROG = "penstock top"
DONE, NO_BUS = 0, 1
# The past of the log is read once nothing came for so long; a year of events does not hold up a look.
QUIET_S, READ_WITHIN_S = 0.5, 30.0
# Engines tell their load every --probe-interval, 5 s unless told otherwise.
STATUS_WITHIN_S = 6.0
# Heartbeats come every second.
HEARTBEATS_S = 1.2
# Without a terminal there are no columns to keep to.
PLAIN_COLUMNS, PLAIN_LINES = 160, 2_000

with warnings.catch_warnings():
    # pydantic warns that `json` hides a deprecated method of its base, which nothing calls.
    warnings.simplefilter("ignore", UserWarning)

    class TopSettings(BusSettings):
        """What the fleet does: instances, load, KV cache, prefix matches, decisions, errors, degraded states.
        Reads the bus only; the address for auditors is enough. `q` or Ctrl-C ends it."""

        model: str = Field("", description="only this model's instances and requests")
        interval: float = Field(1.0, ge=0.2, le=3600, description="seconds between two frames")
        window: int = Field(10, ge=1, le=300, description="seconds that rates and ratios are taken over")
        once: bool = Field(
            False,
            description="print one frame and end, once engines told their load, after 6 s at most; so does "
            "a call without a terminal, unless --json",
        )
        json: bool = Field(False, description="print JSON, one object a frame")  # type: ignore[assignment]  # the flag is --json


def main(argv: Sequence[str] | None = None) -> int:
    """Show frames until SIGINT, SIGTERM, q, or nobody reads; 1 if the bus does not answer at the start."""
    settings = load_or_exit(TopSettings, argv, prog=PROG)
    logging.basicConfig(level=logging.ERROR, format=f"{PROG}: %(message)s", stream=sys.stderr)
    try:
        return asyncio.run(_run(settings))
    except BrokenPipeError:
        # What Python would still write at its end goes nowhere, without a complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


async def _run(settings: TopSettings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    when_nobody_reads(sys.stdout.fileno(), stop.set)
    try:
        async with connected(settings, "top", stop) as bus:
            fleet = Fleet(settings.window, settings.model)
            reading = Reading(bus, fleet, settings.model)
            async with reading.running(settings.window):
                top = Top(settings, bus, fleet, reading, stop)
                await (top.on_screen() if top.has_screen else top.as_lines())
    except BusUnavailable as exc:
        print(f"{PROG}: {exc}", file=sys.stderr)
        return NO_BUS
    return DONE


class Top:
    """Takes a view now and then, and shows it."""

    def __init__(
        self, settings: TopSettings, bus: NatsBus, fleet: Fleet, reading: Reading, stop: asyncio.Event
    ) -> None:
        self._settings, self._bus, self._fleet, self._reading = settings, bus, fleet, reading
        self._stop = stop

    @property
    def has_screen(self) -> bool:
        """Whether frames replace each other on a terminal."""
        return sys.stdout.isatty() and not (self._settings.json or self._settings.once)

    async def on_screen(self) -> None:
        """Until stopped, or the terminal is gone."""
        display, due = Display(sys.stdout.fileno()), asyncio.Event()
        colour = wants_colour(sys.stdout)

        def draw() -> None:
            columns, lines = display.size()
            display.show(frame(self._view(), columns, lines, clock=_clock(), colour=colour))

        def stopped() -> None:
            self._stop.set()
            due.set()

        with contextlib.suppress(OSError), display.opened(), resized(due.set), quit_key(stopped):
            while not self._stop.is_set():
                draw()
                due.clear()
                await self._pause(self._settings.interval, due)

    async def as_lines(self) -> None:
        """One frame, or with --json one after the other."""
        await self._reading.caught_up(QUIET_S, READ_WITHIN_S)
        once = self._settings.once or not self._settings.json
        if once:
            await self._pause(HEARTBEATS_S, asyncio.Event())
            await self._status_known()
        while not self._stop.is_set():
            view = self._view()
            if self._settings.json:
                print(msgspec.json.encode(view).decode(), flush=True)
            else:
                print("\n".join(frame(view, PLAIN_COLUMNS, PLAIN_LINES, clock=_clock())), flush=True)
            if once:
                return
            await self._pause(self._settings.interval, asyncio.Event())

    async def _status_known(self) -> None:
        until = time.monotonic() + STATUS_WITHIN_S
        while time.monotonic() < until and not self._stop.is_set():
            instances = self._view().instances
            if instances and all(one.running is not None for one in instances if one.state == "ready"):
                return
            await self._pause(0.1, asyncio.Event())

    def _view(self) -> View:
        return self._fleet.view(time.time(), self._bus.connected)

    async def _pause(self, seconds: float, due: asyncio.Event) -> None:
        waits = [asyncio.create_task(one.wait(), name="pause") for one in (self._stop, due)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()


def _clock() -> str:
    return time.strftime("%H:%M:%S")


if __name__ == "__main__":
    sys.exit(main())
