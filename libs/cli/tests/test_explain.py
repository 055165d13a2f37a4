"""`penstock explain` over the memory bus: from rings, from the log alone, and nothing known."""

from __future__ import annotations

import asyncio

import pytest

from penstock.cli.explain import main, tell
from penstock.cli.explanation import as_text
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.codec import encode_record
from penstock.common.event_log import EventWriter
from penstock.common.messages import ExplainReply, ExplainRequest
from penstock.common.routing_events import (
    OUTCOME,
    PLACEMENT,
    REJECTION,
    CandidateTerms,
    Explained,
    OutcomeEvent,
    PlacementEvent,
    RejectionEvent,
    ViewAge,
)
from penstock.common.subjects import DEFAULT_SHARD, EVENTS, EXPLAIN
from penstock.common.telemetry import Metrics

PLACED = PlacementEvent(
    "d1",
    "req-1",
    "m",
    "a",
    "prefix-cache:6,least-request:1",
    "s1",
    prompt_tokens=100,
    matched_blocks=3,
    blocks=4,
    candidates=[
        CandidateTerms("a", 0.9, 2, 3, {"prefix-cache": 0.95, "least-request": 0.6}),
        CandidateTerms("b\x1b[31m", 0.25, 0, 0, {"prefix-cache": 0.125, "least-request": 1.0}),
    ],
    excluded={"not-taking-work": 2},
    weights={"prefix-cache": 6 / 7, "least-request": 1 / 7},
    view=ViewAge(0.0, 20.5, -1.0, 3.0, 1),
)
OUTCOME_EVENT = OutcomeEvent(
    "req-1", "m", "completed", 200, "/v1/chat/completions", "i", instance="b", attempts=2
)


class Wire:
    """A bus with a log."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus, self.replica = MemoryBus(self.broker), MemoryBus(self.broker)
        self._writer = EventWriter(self.replica, "scheduler/s1", "1", Metrics())

    async def log(self, *events: tuple[str, str, PlacementEvent | RejectionEvent | OutcomeEvent]) -> None:
        await self.bus.ensure_stream(EVENTS)
        run = asyncio.create_task(self._writer.run(), name="writer")
        for kind, subject, data in events:
            self._writer.emit(kind, "m", subject, data)
            self._writer.close_batches()
        assert await self._writer.flush(10)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    async def ring(self, **held: Explained) -> None:
        """A replica that knows these."""

        def answer(request: ExplainRequest) -> ExplainReply | None:
            found = held.get(request.name.replace("-", "_"))
            return ExplainReply("s1", (encode_record(found),)) if found else None

        await self.replica.serve(EXPLAIN, answer, DEFAULT_SHARD)


async def test_a_ring_and_the_log_together_tell_every_attempt_and_the_outcome() -> None:
    wire = Wire()
    second = PlacementEvent("d2", "req-1", "m", "b", "local", "i")
    await wire.log(
        (PLACEMENT, "req-1", PLACED),
        (PLACEMENT, "req-2", PlacementEvent("d9", "req-2", "m", "a", "random", "s1")),
        (PLACEMENT, "req-1", second),
        (OUTCOME, "req-1", OUTCOME_EVENT),
    )
    await wire.ring(req_1=Explained("same pick, same score", PLACED))
    story = await tell(wire.bus, "req-1", 60)
    assert (list(story.decisions), story.told, story.outcome) == (["d1", "d2"], ["d1"], OUTCOME_EVENT)
    text = as_text(story)
    for words in (
        "request req-1, model m",
        "policy prefix-cache:6,least-request:1 (prefix-cache x 0.857, least-request x 0.143)",
        "-> a, 3 of 4 blocks matched, 100 prompt tokens",
        "excluded: 2 not-taking-work",
        "registry 0 ms old, load 20.5 ms old, engine status never heard",
        "recomputed: same pick, same score",
        "decision d2 by i, attempt 2",
        "placed by the ingress itself",
        "outcome: completed, status 200, from b",
    ):
        assert words in text
    rows = [line.split() for line in text.splitlines() if line.startswith("  * a") or " b\\x1b" in line]
    assert rows == [
        ["*", "a", "0.9000", "0.9500", "0.6000", "2", "3"],
        ["b\\x1b[31m", "0.2500", "0.1250", "1.0000", "0", "0"],
    ]


async def test_without_a_replica_the_log_alone_tells() -> None:
    wire = Wire()
    refused = RejectionEvent("d3", "req-3", "m", "saturated", "s1", message="full", excluded={"saturated": 4})
    await wire.log((REJECTION, "req-3", refused))
    story = await tell(wire.bus, "req-3", 60)
    assert story.asked == "no scheduler answers"
    text = as_text(story)
    assert "refused: saturated: full" in text
    assert "recomputed: its inputs are not in the log" in text
    assert "outcome: none in the log yet" in text


async def test_a_request_that_nobody_knows() -> None:
    wire = Wire()
    await wire.log((PLACEMENT, "req-1", PLACED))
    story = await tell(wire.bus, "other", 60)
    assert not story.known
    assert story.unknown().startswith("nothing is known of other: no scheduler answers")
    await wire.ring()
    story = await tell(wire.bus, "other", 60)
    assert story.unknown().startswith("nothing is known of other: no replica answers for it")


def test_without_a_request_id_it_says_how_to_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "penstock explain REQUEST_ID" in capsys.readouterr().err
