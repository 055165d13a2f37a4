"""Reading the routing log from a range to its end."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from penstock.cli.audit.chains import Part
from penstock.cli.gaps import parse_range
from penstock.common.bus import Bus, Stored
from penstock.common.event_batches import INCARNATION, PREVIOUS, SEQUENCE, WRITER
from penstock.common.subjects import EVENTS


async def messages(
    bus: Bus, subject: str, since: float | None, until: float | None = None, after: int = 0
) -> AsyncGenerator[Stored, None]:
    """Messages from a moment (Unix seconds) or behind a sequence, to another moment or the present one.
    Raises BusError."""
    now = time.time()
    since_s = None if since is None or after else now - since
    end = now if until is None else until
    async with aclosing(bus.read(EVENTS, subject, since_s, after)) as stored:
        async for message in stored:
            # Beyond the present only because the log goes on; clocks may differ a little.
            if message.time_s > end + (1.0 if until is None else 0.0):
                return
            yield message


def part_of(message: Stored, written: float) -> Part | None:
    """What its headers say of its place in a writer's chain; None if that is nothing. `written` is when
    its first event was, Unix seconds."""
    headers = message.headers
    held = parse_range(headers.get(SEQUENCE, ""))
    writer, incarnation = headers.get(WRITER, ""), headers.get(INCARNATION, "")
    if held is None or not writer or not incarnation:
        return None
    return Part(
        writer, incarnation, *held, headers.get(PREVIOUS, ""), message.payload, message.time_s, written
    )
