"""`penstock tap` over the memory bus: filters, gaps, broken messages, the summary."""

import asyncio

import msgspec
import pytest

from penstock.cli.tap import Tap, TapSettings
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.event_log import EventWriter
from penstock.common.routing_events import OUTCOME, PLACEMENT, TYPES, OutcomeEvent, PlacementEvent
from penstock.common.settings import SettingsError, load
from penstock.common.subjects import EVENTS, event_subject
from penstock.common.telemetry import Metrics

BATCH = "application/cloudevents-batch+json"


def settings(*argv: str) -> TapSettings:
    return load(TapSettings, argv, prog="penstock tap", environ={})


def placement(number: int, model: str = "m") -> PlacementEvent:
    return PlacementEvent(f"d{number}", f"req-{number}", model, "sim-1", "random", "r1")


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_event_can_be_asked_for(kind: str) -> None:
    assert settings("--type", kind).type == kind


class Log:
    """A routing log with a writer, and the lines a tap shows of it."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.writer = EventWriter(self.bus, "scheduler/r1", "i1", Metrics())
        self.lines: list[str] = []

    async def write(self, *kinds: str, model: str = "m") -> None:
        """One event of each kind."""
        await self.bus.ensure_stream(EVENTS)
        run = asyncio.create_task(self.writer.run(), name="writer")
        for number, kind in enumerate(kinds, 1):
            outcome = OutcomeEvent(f"req-{number}", model, "completed", 200, "/v1/chat/completions", "i")
            data: msgspec.Struct = outcome if kind == OUTCOME else placement(number, model)
            self.writer.emit(kind, model, f"req-{number}", data)
            self.writer.close_batches()
        assert await self.writer.flush(10)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    async def store(self, payload: bytes, headers: dict[str, str], kind: str = PLACEMENT) -> None:
        await self.bus.ensure_stream(EVENTS)
        await self.bus.append(event_subject(kind, "m"), payload, headers)

    async def tap(self, *argv: str, count: int) -> Tap:
        tap = Tap(settings("--since", "1h", "--count", str(count), *argv), self.lines.append, colour=False)
        async with asyncio.timeout(10):
            await tap.follow(self.bus)
        return tap


async def test_events_come_one_a_line_and_the_summary_counts_them() -> None:
    log = Log()
    await log.write(PLACEMENT, OUTCOME, PLACEMENT)
    tap = await log.tap(count=3)
    assert [line.split()[1:3] for line in log.lines] == [
        ["placement", "req-1"],
        ["outcome", "req-2"],
        ["placement", "req-3"],
    ]
    assert tap.summary() == "3 events: 1 outcome, 2 placement"


async def test_json_lines_are_cloud_events() -> None:
    log = Log()
    await log.write(PLACEMENT)
    await log.tap("--json", count=1)
    event = msgspec.json.decode(log.lines[0])
    assert (event["specversion"], event["type"]) == ("1.0", "penstock.placement.v1")
    assert event["data"]["request_id"] == "req-1"


@pytest.mark.parametrize(
    ("argv", "seen"), [(("--type", "outcome"), "req-2"), (("--type", "placement", "--model", "m"), "req-1")]
)
async def test_filters_leave_the_rest_out_and_see_no_gap_in_it(argv: tuple[str, ...], seen: str) -> None:
    log = Log()
    await log.write(PLACEMENT, OUTCOME, PLACEMENT, OUTCOME)
    await log.tap(*argv, count=2)
    assert len(log.lines) == 2
    assert seen in log.lines[0]


async def test_a_model_that_needs_escaping_is_found() -> None:
    log = Log()
    await log.write(PLACEMENT, model="org/model.v1:tag")
    await log.tap("--model", "org/model.v1:tag", count=1)
    assert "req-1" in log.lines[0]


async def test_missing_numbers_are_shown_as_a_line() -> None:
    log = Log()
    await log.write(PLACEMENT, PLACEMENT, PLACEMENT, PLACEMENT)
    del log.broker.streams[EVENTS.name].messages[1:3]
    tap = await log.tap(count=2)
    assert log.lines[1] == "-- gap: events 2-3 of scheduler/r1/i1 are missing"
    assert tap.summary() == "2 events: 2 placement, 2 missing"


@pytest.mark.parametrize(
    ("payload", "content_type"),
    [
        (b"\xff\xfe", BATCH),
        (b"[]", "text/plain"),
        (b'[{"type":"penstock.placement.v1"}]', BATCH),
        (b"[1]", BATCH),
    ],
)
async def test_broken_messages_are_counted_and_the_rest_goes_on(payload: bytes, content_type: str) -> None:
    log = Log()
    await log.store(payload, {"content-type": content_type, "Penstock-Sequence": "x"})
    await log.write(PLACEMENT)
    tap = await log.tap(count=1)
    assert log.lines[0].startswith("-- broken: message 1 on ")
    assert "req-1" in log.lines[1]
    assert tap.summary() == "1 event: 1 placement, 1 broken"


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1.5h", 5400)]
)
def test_since_takes_a_number_and_its_unit(text: str, seconds: float) -> None:
    assert settings("--since", text).since == seconds


@pytest.mark.parametrize(
    "argv", [("--since", "10"), ("--since", "-5m"), ("--type", "plaecment"), ("--count", "-1")]
)
def test_a_bad_flag_is_a_fault_that_names_it(argv: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=argv[0]):
        settings(*argv)
