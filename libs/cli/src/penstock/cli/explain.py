"""`penstock explain REQUEST_ID`: why a request went where, from the replicas' memory and the routing log."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from pydantic import Field

from penstock.cli import event_lines
from penstock.cli.bus_connection import connected
from penstock.cli.explanation import Story, as_text
from penstock.common.bus import Bus, Stored
from penstock.common.errors import BusError, BusUnavailable
from penstock.common.messages import ExplainRequest
from penstock.common.permissions import EXPLAINS
from penstock.common.routing_events import (
    LOST,
    OUTCOME,
    PLACEMENT,
    REJECTION,
    Explained,
    OutcomeEvent,
    PlacementEvent,
    RejectionEvent,
)
from penstock.common.settings import BusSettings, load_or_exit
from penstock.common.subjects import DEFAULT_SHARD, EVENTS, EXPLAIN, event_filter

PROG = "penstock explain"
FOUND, UNKNOWN, BAD_USE = 0, 1, 2
ANSWER_WITHIN_S = 1.0
# With nothing new for so long, all of the log was read.
QUIET_S = 1.0
# Decisions of one request that are asked for one by one.
MAX_ASKED = 16

with warnings.catch_warnings():
    # pydantic warns that `json` hides a deprecated method of its base, which nothing calls.
    warnings.simplefilter("ignore", UserWarning)

    class ExplainSettings(BusSettings):
        """Why a request went where: every candidate, score by score. Call it as penstock explain REQUEST_ID
        [flags]; the id is the response's x-request-id, or a decision's."""

        since: float = Field(
            3600.0, gt=0, le=7 * 86400, description="seconds of the routing log that are searched"
        )
        json: bool = Field(False, description="print JSON")  # type: ignore[assignment]  # the flag is --json


def main(argv: Sequence[str] | None = None) -> int:
    """Print the explanation; 1 if nothing is known of the request, 2 for bad use."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    settings = load_or_exit(ExplainSettings, arguments, prog=PROG)
    if not 0 < len(name) <= 512:
        print(f"{PROG}: which request? {PROG} REQUEST_ID [flags]", file=sys.stderr)
        return BAD_USE
    logging.basicConfig(level=logging.ERROR, format=f"{PROG}: %(message)s", stream=sys.stderr)
    return asyncio.run(_run(settings, name))


async def _run(settings: ExplainSettings, name: str) -> int:
    try:
        async with connected(settings, EXPLAINS) as bus:
            story = await tell(bus, name, settings.since)
    except BusUnavailable as exc:
        print(f"{PROG}: {exc}", file=sys.stderr)
        return UNKNOWN
    if not story.known:
        print(f"{PROG}: {story.unknown()}", file=sys.stderr)
        return UNKNOWN
    print(msgspec.json.encode(story).decode() if settings.json else as_text(story))
    return FOUND


async def tell(bus: Bus, name: str, since_s: float) -> Story:
    """All that is known of a request: what replicas still hold, and what the log says."""
    story = Story(name)
    await _ask(bus, name, story)
    await _read(bus, story, since_s)
    missing = [one for one in story.decisions if one not in story.told]
    for decision in missing[:MAX_ASKED]:
        await _ask(bus, decision, story)
    return story


async def _ask(bus: Bus, name: str, story: Story) -> None:
    try:
        reply = await bus.request(EXPLAIN, ExplainRequest(name), DEFAULT_SHARD, deadline_s=ANSWER_WITHIN_S)
        for one in reply.decisions:
            story.answered(reply.replica, msgspec.json.decode(one, type=Explained))
    except BusUnavailable:
        story.asked = "no scheduler answers"
    except BusError:
        story.asked = story.asked or "no replica answers for it"
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        story.asked = f"an answer cannot be read: {exc}"


async def _read(bus: Bus, story: Story, since_s: float) -> None:
    """Take what the log says, up to now."""
    progress = _Progress()
    reading = asyncio.create_task(_follow(bus, story, since_s, progress), name="log")
    try:
        while not reading.done():
            before = progress.messages
            await asyncio.wait([reading], timeout=QUIET_S)
            if progress.messages == before:
                break
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class _Progress:
    messages = 0


async def _follow(bus: Bus, story: Story, since_s: float, progress: _Progress) -> None:
    started = time.time()
    async with aclosing(bus.follow(EVENTS, event_filter(), since_s)) as messages:
        async for message in messages:
            progress.messages += 1
            _take(message, story)
            if message.time_s > started:
                return


def _take(message: Stored, story: Story) -> None:
    """Events about the request; what cannot be read is passed over."""
    if story.name.encode() not in message.payload:
        return
    try:
        for raw in event_lines.split(message.headers, message.payload):
            event = event_lines.parse(raw)
            if event.kind == PLACEMENT:
                placement = msgspec.json.decode(event.data, type=PlacementEvent)
                if story.name in (placement.request_id, placement.decision_id):
                    story.logged(Explained("", placement))
            elif event.kind == REJECTION:
                rejection = msgspec.json.decode(event.data, type=RejectionEvent)
                if story.name in (rejection.request_id, rejection.decision_id):
                    story.logged(Explained("", None, rejection))
            elif event.kind == OUTCOME:
                outcome = msgspec.json.decode(event.data, type=OutcomeEvent)
                told = event.subject == story.name or story.name in outcome.decisions
                if told and (story.outcome is None or outcome.outcome != LOST):
                    story.outcome = outcome
    except (event_lines.BrokenEvent, msgspec.MsgspecError, UnicodeDecodeError):
        return


if __name__ == "__main__":
    sys.exit(main())
