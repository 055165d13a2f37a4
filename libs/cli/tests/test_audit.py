"""Verifying and exporting a log that writers have written, whole and not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from pathlib import Path

import msgspec
import pytest

from penstock.cli.audit.__main__ import main, verify
from penstock.cli.audit.chains import Fault
from penstock.cli.audit.export import Export
from penstock.cli.audit.report import as_text
from penstock.cli.audit.settings import ExportSettings, VerifySettings
from penstock.cli.audit.verifying import Verdict
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.bus import Stored
from penstock.common.errors import BusError
from penstock.common.event_log import EventWriter
from penstock.common.open_requests import lost_outcome
from penstock.common.routing_events import (
    DEGRADED,
    OUTCOME,
    PLACEMENT,
    WRITER_CHANGE,
    DegradedEvent,
    OutcomeEvent,
    PlacementEvent,
    WriterChange,
    WriterEvent,
)
from penstock.common.settings import SettingsError, load
from penstock.common.subjects import EVENTS
from penstock.common.telemetry import Metrics


def settings(*argv: str) -> VerifySettings:
    return load(VerifySettings, argv, prog="audit", environ={})


class Log:
    """A scheduler and an ingress worker, and the stream that they write to."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.scheduler = EventWriter(self.bus, "scheduler/s", "run1", Metrics())
        self.ingress = EventWriter(self.bus, "ingress/i", "a", Metrics())

    @property
    def messages(self) -> list[Stored]:
        return self.broker.streams[EVENTS.name].messages

    def place(self, number: int) -> None:
        placed = PlacementEvent(f"a.{number:x}", f"r{number}", "m", "sim-1", "random", "s", "i")
        self.scheduler.emit(PLACEMENT, "m", f"r{number}", placed)

    def end(self, number: int) -> None:
        ended = OutcomeEvent(f"r{number}", "m", "completed", 200, "/", "i", [f"a.{number:x}"], "sim-1")
        self.ingress.emit(OUTCOME, "m", f"r{number}", ended)

    def say(self, writer: EventWriter, text: str = "x") -> None:
        writer.emit(DEGRADED, "", "s", DegradedEvent("s", "s", text, True))

    async def stored(self) -> None:
        """What was said so far, in the stream: each writer's in messages of its own."""
        for writer in (self.scheduler, self.ingress):
            running = asyncio.create_task(writer.run(), name="event-log")
            assert await writer.flush(5)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def requests(self, *numbers: int) -> None:
        for number in numbers:
            self.place(number)
            self.end(number)
            await self.stored()

    async def verdict(self) -> Verdict:
        return await verify(self.bus, None, 0.0)

    def change(self, place: int, **fields: object) -> None:
        self.messages[place] = msgspec.structs.replace(self.messages[place], **fields)


@pytest.fixture
async def log() -> Log:
    log = Log()
    await log.requests(1, 2, 3)
    return log


def found(verdict: Verdict) -> list[tuple[str, str, int, int]]:
    return [(fault.kind, fault.writer, fault.first, fault.last) for fault in verdict.faults]


async def test_a_whole_log_is_clean_and_its_heads_are_told(log: Log) -> None:
    verdict = await log.verdict()
    assert (verdict.clean, verdict.whole, verdict.faults) == (True, True, [])
    assert (verdict.decided, verdict.finished, verdict.lost, verdict.open) == (3, 3, 0, 0)
    assert {(head.writer, head.last) for head in verdict.heads} == {("scheduler/s", 3), ("ingress/i", 3)}
    assert as_text(verdict).endswith("\nclean")
    last = log.messages[-1]
    hashed = hashlib.sha256(last.headers["Penstock-Previous"].encode() + last.payload).hexdigest()
    assert hashed in {head.hash for head in verdict.heads}


async def test_one_byte_of_one_message_is_found(log: Log) -> None:
    log.change(2, payload=log.messages[2].payload.replace(b"sim-1", b"sim-2"))
    verdict = await log.verdict()
    assert found(verdict) == [("chain", "scheduler/s", 3, 3)]
    assert "chain     scheduler/s run run1, events 3-3 (1): " in as_text(verdict)
    assert as_text(verdict).endswith("NOT WHOLE: 1 faults")


async def test_a_message_taken_from_the_middle_is_named_with_the_decision_it_held(log: Log) -> None:
    del log.messages[2]
    verdict = await log.verdict()
    assert found(verdict) == [("sequence", "scheduler/s", 2, 2), ("undecided", "ingress/i", 2, 2)]
    assert verdict.faults[1].ids == ("a.2",)


async def test_an_outcome_taken_away_is_named_with_its_request(log: Log) -> None:
    del log.messages[3]
    verdict = await log.verdict()
    assert found(verdict) == [("sequence", "ingress/i", 2, 2), ("unfinished", "ingress/i", 2, 2)]


@pytest.mark.parametrize(
    ("header", "value", "kind"),
    [
        ("Penstock-Sequence", "2-3", "altered"),
        ("Penstock-Writer", "scheduler/other", "altered"),
        ("Penstock-Sequence", "no range", "unreadable"),
        ("content-type", "text/plain", "unreadable"),
    ],
)
async def test_a_changed_header_is_found(log: Log, header: str, value: str, kind: str) -> None:
    log.change(2, headers={**log.messages[2].headers, header: value})
    verdict = await log.verdict()
    assert kind in {fault.kind for fault in verdict.faults}


async def test_what_is_stored_twice_under_the_same_ids_is_no_fault(log: Log) -> None:
    log.messages.append(log.messages[1])
    verdict = await log.verdict()
    assert (verdict.clean, verdict.repeated, verdict.finished) == (True, 1, 3)


async def test_requests_of_a_dead_ingress_are_lost_or_named(log: Log) -> None:
    for number in (4, 5):
        log.place(number)
    witness = EventWriter(log.bus, "scheduler/w", "1", Metrics())
    gone = WriterEvent("ingress/i", "a", WriterChange.SILENT, "w", cause="it has said nothing for 5 s")
    witness.emit(WRITER_CHANGE, "", "ingress/i", gone)
    lost = lost_outcome(["a.4"], "", "m", "i", "w", "it has said nothing for 5 s")
    witness.emit(OUTCOME, "m", "a.4", lost)
    log.scheduler, scheduler = witness, log.scheduler
    await log.stored()
    log.scheduler = scheduler
    await log.stored()
    verdict = await log.verdict()
    assert verdict.lost == 1
    assert found(verdict) == [("tail", "ingress/i", 4, 0), ("unfinished", "ingress/i", 5, 5)]
    assert verdict.faults[1].cause.startswith("it has no outcome; it has said nothing for 5 s, as w saw at ")
    assert "tail      ingress/i run a, events from 4 on: " in as_text(verdict)


async def test_what_a_full_buffer_had_to_drop_is_named_with_its_cause(log: Log) -> None:
    log.scheduler = EventWriter(log.bus, "scheduler/full", "run1", Metrics(), max_kept_bytes=64 * 1024)
    log.broker.set_up(False)
    for number in range(100):
        log.say(log.scheduler, random.Random(number).randbytes(1000).hex())
        log.scheduler.close_batches()
    log.broker.set_up(True)
    await log.stored()
    (fault,) = (await log.verdict()).faults
    assert (fault.kind, fault.writer, fault.first) == ("sequence", "scheduler/full", 1)
    assert 40 < fault.count == fault.last < 100
    assert fault.cause == "the buffer was full while the bus was away"


async def test_an_empty_log_and_none_at_all(tmp_path: Path) -> None:
    log = Log()
    with pytest.raises(BusError):
        await log.verdict()
    await log.bus.ensure_stream(EVENTS)
    verdict = await log.verdict()
    assert (verdict.clean, verdict.notes) == (True, ["the log holds nothing in this range"])


def export(path: Path, messages: list[Stored], *, resume: bool = False) -> list[dict[str, object]]:
    with Export(path, resume=resume) as one:
        for message in messages:
            if message.sequence > one.after:
                one.take(message)
        one.manifest()
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_an_export_holds_each_event_once_and_a_manifest(log: Log, tmp_path: Path) -> None:
    log.messages.append(msgspec.structs.replace(log.messages[1], sequence=7))
    path = tmp_path / "log.jsonl"
    *events, last = export(path, log.messages)
    assert [event["id"] for event in events] == [
        f"{writer}/{n}" for n in (1, 2, 3) for writer in ("scheduler/s/run1", "ingress/i/a")
    ]
    manifest = last["manifest"]
    assert isinstance(manifest, dict)
    assert (manifest["events"], manifest["messages"], manifest["repeated"]) == (6, 7, 1)
    assert (manifest["first_sequence"], manifest["last_sequence"]) == (1, 7)
    content = path.read_bytes()
    assert manifest["sha256"] == hashlib.sha256(content[: content.index(b'{"manifest"')]).hexdigest()
    with pytest.raises(FileExistsError):
        Export(path, resume=False)


async def test_an_export_that_was_broken_off_goes_on(log: Log, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    export(path, log.messages[:3])
    with path.open("ab") as file:
        file.write(b'{"specversion": "1.0", "id": "half of it')
    lines = export(path, log.messages, resume=True)
    assert ["manifest" in line for line in lines] == [False] * 3 + [True] + [False] * 3 + [True]
    assert lines[-1]["manifest"]["events"] == 6  # type: ignore[index]
    assert export(path, log.messages, resume=True)[:-1] == lines


@pytest.mark.parametrize("argv", [["--since", "soon"], ["--settle", "-1"], ["--sinse", "1m"]])
def test_bad_flags_are_told(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        settings(*argv)


def test_moments_are_spans_or_dates() -> None:
    assert settings("--since", "2026-01-31T12:00:00Z").since == 1769860800.0
    assert settings("--since", "2026-01-31T12:00:00").since == 1769860800.0
    until = load(ExportSettings, ["--until", "10m"], prog="audit", environ={}).until
    since = settings("--since", "20m").since
    assert until is not None
    assert since is not None
    assert 590 < until - since < 610


@pytest.mark.parametrize("argv", [[], ["verfy"], ["export", "--resume"]])
def test_what_is_not_understood_ends_with_code_two(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err


def test_faults_are_shown_with_names_ranges_and_causes() -> None:
    fault = Fault("unfinished", "ingress/i", "5f2a", 16, 31, 3, "it was killed", ids=("5f2a.10", "5f2a.1f"))
    verdict = Verdict(
        False, False, "a", "b", 1, 2, 3, 0, 0, 4, 5, 0, 0, 0, [fault], more_faults=2, notes=[], heads=[]
    )
    text = as_text(verdict)
    assert "unfinished ingress/i run 5f2a, decisions 5f2a.10-5f2a.1f (3): it was killed" in text
    assert "5f2a.10, 5f2a.1f, ..." in text
    assert "and 2 more" in text
    assert text.endswith("NOT WHOLE: 3 faults")
