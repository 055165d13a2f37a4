"""`penstock top`: what is added up, what is drawn, what is read from the bus."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from penstock.cli.terminal import plain
from penstock.cli.top.fleet import MAX_OPEN, MAX_STATES, Ended, Fleet, Placed, Refused
from penstock.cli.top.frame import cut, frame
from penstock.cli.top.sources import Reading
from penstock.cli.top.view import InstanceView, View
from penstock.cli.top.window import Latest, Window
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.event_log import EventWriter
from penstock.common.messages import EngineStatus, Heartbeat
from penstock.common.model import EngineLoad
from penstock.common.routing_events import (
    DEGRADED,
    INSTANCE,
    KV_EVENTS_OF,
    OUTCOME,
    PLACEMENT,
    REJECTION,
    BreakerEvent,
    DegradedEvent,
    InstanceEvent,
    OutcomeEvent,
    PlacementEvent,
    RejectionEvent,
)
from penstock.common.subjects import EVENTS, HEARTBEAT, STATUS, event_subject
from penstock.common.telemetry import Metrics

NOW = 1_000.0
WINDOW_S = 10


def instance(name: str, change: str = "added", **changed: object) -> InstanceEvent:
    known = {"endpoint": f"{name}:8000", "source": "redis", "models": ("m",), "state": "ready"}
    return InstanceEvent(name, change, **{**known, **changed})  # type: ignore[arg-type]  # a table of fields


def fleet(*names: str) -> Fleet:
    made = Fleet(WINDOW_S)
    made.connection(True, NOW - 60)
    for name in names:
        made.instance(instance(name))
    return made


def only(view: View) -> InstanceView:
    (one,) = view.instances
    return one


def degraded(what: str, active: bool = True, service: str = "scheduler", name: str = "s1") -> DegradedEvent:
    return DegradedEvent(service, name, what, active, "because")


def test_rates_are_over_the_window_and_what_is_older_is_gone() -> None:
    window = Window(10)
    for at in range(985, 1000):
        window.add(at + 0.5, "x", 2)
    assert window.totals(999.9)["x"] == 20
    assert window.totals(1004.9)["x"] == 10
    assert window.totals(2000)["x"] == 0
    window.add(980, "x", 100)
    assert window.totals(999.9)["x"] == 20


def test_quantiles_forget_what_is_old_and_are_none_of_nothing() -> None:
    latest = Latest(10)
    assert latest.quantiles(NOW, 0.5) == (None,)
    latest.add(NOW - 11, 1e9)
    for value in range(1, 101):
        latest.add(NOW, float(value))
    assert latest.quantiles(NOW, 0.5, 0.99) == (51.0, 100.0)


def test_requests_are_in_flight_from_placement_to_outcome_in_any_order() -> None:
    made = fleet("a", "b")
    made.placed(NOW, Placed("d1", "a", "cache-aware", matched_blocks=3, blocks=4))
    made.placed(NOW, Placed("d2", "b", "local", prefill_instance="a"))
    made.ended(NOW, Ended("completed", 200, ("d3",), "b", 5.0, 100, 10, 60))
    made.placed(NOW, Placed("d3", "b"))
    view = made.view(NOW, True)
    assert {one.id: one.in_flight for one in view.instances} == {"a": 2, "b": 1}
    assert view.totals.in_flight == 2
    assert (view.totals.decisions_per_s, view.totals.requests_per_s) == (0.3, 0.1)
    assert (view.totals.match_ratio, view.totals.hit_ratio) == (0.75, 0.6)
    assert view.totals.local_ratio == pytest.approx(1 / 3, abs=1e-3)
    assert view.totals.ttft_p50_ms == 5.0
    made.ended(NOW, Ended("failed", 502, ("d1",), "a"))
    made.refused(NOW, Refused("saturated"))
    view = made.view(NOW, True)
    assert [(one.id, one.errors_per_s) for one in view.instances] == [("a", 0.1), ("b", 0.0)]
    assert view.totals.rejections_per_s == 0.1


def test_what_was_expected_in_kv_caches_is_held_against_what_engines_found() -> None:
    made = fleet("a", "b")
    for number, (name, cached) in enumerate((("a", 50), ("a", 90), ("b", 0))):
        made.placed(NOW, Placed(f"d{number}", name, matched_blocks=3, blocks=4))
        made.ended(NOW, Ended("completed", 200, (f"d{number}",), name, 5.0, 100, 10, cached))
    # A pair, and a prompt that nobody was expected to hold.
    made.placed(NOW, Placed("d8", "a", prefill_instance="b", matched_blocks=4, blocks=4))
    made.placed(NOW, Placed("d9", "a", blocks=4))
    for name in ("d8", "d9"):
        made.ended(NOW, Ended("completed", 200, (name,), "a", 5.0, 100, 10, 0))
    view = made.view(NOW, True)
    found = {one.id: one.precision_ratio for one in view.instances}
    # Of b nothing was confirmed: it may not report it.
    assert found == {"a": pytest.approx(125 / 150, abs=1e-4), "b": None}
    assert view.totals.precision_ratio == pytest.approx(125 / 225, abs=1e-4)
    drawn = frame(view, 120, 24, clock="12:00:00")
    assert "precision 56%" in drawn[2]
    assert [line.split()[-1] for line in drawn[-3:]] == ["PREC", "83%", "-"]


def test_an_instance_whose_kv_events_are_not_trusted_says_so() -> None:
    made = fleet("a", "b")
    made.heartbeat(NOW, Heartbeat("scheduler", "s1", "1", True))
    made.degraded(NOW, degraded(f"{KV_EVENTS_OF}a"))
    view = made.view(NOW, True)
    assert {one.id: one.kv_events_distrusted for one in view.instances} == {"a": True, "b": False}
    drawn = frame(view, 120, 24, clock="12:00:00")
    assert [line.split()[-1] for line in drawn[-2:]] == ["-!", "-"]
    assert any(line.startswith("degraded") and line.count(f"{KV_EVENTS_OF}a") for line in drawn)
    made.degraded(NOW, degraded(f"{KV_EVENTS_OF}a", active=False))
    assert not any(one.kv_events_distrusted for one in made.view(NOW, True).instances)


@pytest.mark.parametrize(
    ("outcome", "status", "errors"),
    [
        ("completed", 200, 0),
        ("completed", 400, 0),
        ("completed", 503, 0.1),
        ("rejected", 404, 0),
        ("client_gone", 0, 0),
        ("timed_out", 504, 0.1),
        ("lost", 0, 0.1),
    ],
)
def test_errors_are_those_of_the_fleet(outcome: str, status: int, errors: float) -> None:
    made = fleet("a")
    made.ended(NOW, Ended(outcome, status, ("d1",), "a"))
    assert made.view(NOW, True).totals.errors_per_s == errors


def test_an_engines_load_is_shown_while_it_is_fresh() -> None:
    made = fleet("a")
    made.status(NOW - 1, EngineStatus("a", EngineLoad(running=3, waiting=1, kv_usage_ratio=0.5)))
    one = only(made.view(NOW, True))
    assert (one.running, one.waiting, one.kv_usage_ratio) == (3, 1, 0.5)
    one = only(made.view(NOW + 60, True))
    assert (one.running, one.waiting, one.kv_usage_ratio) == (None, None, None)


def test_instances_follow_the_log() -> None:
    made = fleet("a", "b")
    made.instance(instance("a", "unhealthy", state="unhealthy", reason="probe", role="prefill"))
    made.instance(instance("b", "removed"))
    made.instance(instance("key/of/a/record", "skipped", state=""))
    one = only(made.view(NOW, True))
    assert (one.id, one.state, one.reason, one.role) == ("a", "unhealthy", "probe", "prefill")


def test_a_model_narrows_the_instances() -> None:
    made = Fleet(WINDOW_S, "m")
    made.instance(instance("a"))
    made.instance(instance("b", models=("other",)))
    assert only(made.view(NOW, True)).id == "a"


def test_degraded_states_end_by_their_event_or_with_their_process() -> None:
    made = fleet()
    for name in ("s1", "s2"):
        made.heartbeat(NOW, Heartbeat("scheduler", name, "1", True))
    made.degraded(NOW - 90, degraded("discovery"))
    made.degraded(NOW - 50, degraded("discovery"))
    made.degraded(NOW - 9, degraded("a scheduler"))
    made.degraded(NOW - 8, degraded("a scheduler", active=False))
    made.degraded(NOW, degraded("registry", name="gone"))
    made.degraded(NOW, degraded("registry", name="s2"))
    told = made.view(NOW, True).degraded
    assert [(one.id, one.what, one.for_s) for one in told] == [
        ("s1", "discovery", 90.0),
        ("s2", "registry", 0.0),
    ]
    made.heartbeat(NOW + 10, Heartbeat("scheduler", "s1", "1", True))
    assert [one.id for one in made.view(NOW + 10, True).degraded] == ["s1"]


def test_nobody_is_given_up_while_we_are_deaf() -> None:
    made = fleet()
    made.heartbeat(NOW, Heartbeat("scheduler", "s1", "1", True))
    made.degraded(NOW, degraded("discovery"))
    made.connection(False, NOW)
    assert made.view(NOW + 3600, False).degraded
    made.connection(True, NOW + 3600)
    assert made.view(NOW + 3604, True).degraded
    assert not made.view(NOW + 3606, True).degraded


def test_breakers_are_shown_until_they_close() -> None:
    made = fleet()
    made.heartbeat(NOW, Heartbeat("ingress", "i1", "1", True))
    made.breaker(BreakerEvent("instance", "a", "open", "i1"))
    made.breaker(BreakerEvent("endpoint", "x", "open", "i1"))
    made.breaker(BreakerEvent("instance", "a", "half_open", "i1"))
    made.breaker(BreakerEvent("endpoint", "x", "closed", "i1"))
    assert [(one.target, one.state) for one in made.view(NOW, True).breakers] == [("a", "half_open")]


def test_everything_is_bounded() -> None:
    made = fleet()
    for number in range(MAX_OPEN + 10):
        made.placed(NOW, Placed(f"d{number}", "a"))
    for number in range(MAX_STATES + 10):
        made.degraded(NOW, degraded(f"what {number}", name="s1"))
        made.heartbeat(NOW, Heartbeat("scheduler", f"s{number}", "1", True))
    made.heartbeat(NOW, Heartbeat("scheduler", "s1", "1", True))
    view = made.view(NOW, True)
    assert view.totals.in_flight == MAX_OPEN
    assert (len(view.degraded), len(view.processes)) == (MAX_STATES, MAX_STATES)
    assert made.view(NOW + 4000, True).totals.in_flight == 0


HOSTILE = "\x1b[2J\x07 in\nstance \u202e\u0301 日本語 " + "x" * 600


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
@pytest.mark.parametrize("lines", [1, 5, 24, 100])
def test_a_frame_fits_whatever_things_are_called(columns: int, lines: int) -> None:
    made = fleet(*(f"{HOSTILE}{number}" for number in range(40)))
    made.heartbeat(NOW, Heartbeat("scheduler", HOSTILE, "1", False))
    for number in range(20):
        made.degraded(NOW, DegradedEvent("scheduler", HOSTILE, f"{number}{HOSTILE}", True, HOSTILE))
    drawn = frame(made.view(NOW, True), columns, lines, clock="12:00:00")
    assert len(drawn) <= lines
    for line in drawn:
        assert plain(line) == line
        assert cut(line, columns) == line


def test_a_frame_says_what_it_leaves_out() -> None:
    drawn = frame(fleet(*map(str, range(40))).view(NOW, True), 100, 24, clock="12:00:00")
    assert len(drawn) == 24
    assert drawn[-1] == f"... and {40 - 17} more instances"


def test_a_lost_bus_is_the_first_thing_to_see() -> None:
    drawn = frame(fleet("a").view(NOW, False), 100, 24, clock="12:00:00", colour=True)
    assert "BUS LOST" in drawn[0]
    assert drawn[0].startswith("\x1b[31m")


async def test_the_log_status_and_heartbeats_are_read_and_what_is_broken_is_counted() -> None:
    bus = MemoryBus(MemoryBroker())
    writer = EventWriter(bus, "scheduler/r1", "i1", Metrics())
    await bus.ensure_stream(EVENTS)
    run = asyncio.create_task(writer.run(), name="writer")
    events: list[tuple[str, msgspec.Struct]] = [
        (INSTANCE, instance("a")),
        (DEGRADED, degraded("discovery")),
        (PLACEMENT, PlacementEvent("d1", "r1", "m", "a", "random", "r1", blocks=4, matched_blocks=1)),
        (PLACEMENT, PlacementEvent("d2", "r2", "m", "a", "random", "r1")),
        (OUTCOME, OutcomeEvent("r1", "m", "completed", 200, "/v1/chat/completions", "i", ["d1"], "a")),
        (REJECTION, RejectionEvent("d3", "r3", "m", "saturated", "r1")),
    ]
    for kind, data in events:
        writer.emit(kind, "" if kind in (INSTANCE, DEGRADED) else "m", "x", data)
    assert await writer.flush(10)
    await bus.append(event_subject(PLACEMENT, "m"), b"[{", {"content-type": "application/cloudevents+json"})
    watched = Fleet(300)
    reading = Reading(bus, watched)
    async with reading.running(300):
        await reading.caught_up(0.3, 10)
        bus.publish(STATUS, EngineStatus("a", EngineLoad(running=7)), "a")
        bus.publish(HEARTBEAT, Heartbeat("scheduler", "s1", "1", True), "scheduler")
        view = await told(watched)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert (only(view).running, only(view).in_flight, view.broken) == (7, 1, 1)
    assert view.totals.decisions_per_s == pytest.approx(2 / 300, abs=0.01)
    assert [one.what for one in view.degraded] == ["discovery"]


async def told(watched: Fleet) -> View:
    """The view, once status and heartbeat are in it: the memory bus delivers in turns of the loop."""
    for _ in range(100):
        view = watched.view(time.time(), True)
        if view.processes and only(view).running is not None:
            return view
        await asyncio.sleep(0)
    raise AssertionError("neither status nor heartbeat came")
