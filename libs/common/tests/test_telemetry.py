"""Metrics are plain numbers that add up over processes; log lines are JSON."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.telemetry import (
    MAX_CELLS,
    OVERFLOW,
    FamilySnapshot,
    Metrics,
    Snapshot,
    configure_logging,
    merge,
)


def values(snapshot: Snapshot, name: str) -> dict[tuple[str, ...], float]:
    """Label values and value of each cell of a family."""
    return {s.labels: s.value for family in snapshot if family.name == name for s in family.samples}


def process(requests: dict[str, float], latencies: list[float]) -> Snapshot:
    metrics = Metrics()
    counter = metrics.counter("penstock_requests_total", "Requests", "model")
    for model, count in requests.items():
        counter.inc(model, by=count)
    histogram = metrics.histogram("penstock_latency_seconds", "Latency", bounds=(0.1, 1.0))
    for latency in latencies:
        histogram.labels().observe(latency)
    metrics.gauge("penstock_open", "Open streams", lambda: len(latencies))
    return metrics.snapshot()


def test_a_counter_without_labels_is_there_from_the_start() -> None:
    metrics = Metrics()
    metrics.counter("penstock_a_total", "A")
    metrics.counter("penstock_b_total", "B", "model")
    assert values(metrics.snapshot(), "penstock_a_total") == {(): 0}
    assert values(metrics.snapshot(), "penstock_b_total") == {}


def test_asking_for_a_metric_again_gives_the_same_one() -> None:
    metrics = Metrics()
    metrics.counter("penstock_a_total", "A").inc()
    metrics.counter("penstock_a_total", "A").inc(by=2)
    metrics.histogram("penstock_b_seconds", "B").labels().observe(1)
    metrics.histogram("penstock_b_seconds", "B").labels().observe(2)
    assert values(metrics.snapshot(), "penstock_a_total") == {(): 3}
    assert values(metrics.snapshot(), "penstock_b_seconds") == {(): 3}


def test_a_kept_cell_is_what_is_exported() -> None:
    metrics = Metrics()
    cell = metrics.counter("penstock_a_total", "A", "x").labels("1")
    cell.value += 5
    assert values(metrics.snapshot(), "penstock_a_total") == {("1",): 5}


def test_a_gauge_is_read_when_the_snapshot_is_taken() -> None:
    metrics = Metrics()
    held = {("a",): 1.0}
    metrics.gauge("penstock_plain", "P", lambda: len(held))
    metrics.gauge("penstock_labelled", "L", held.items, "model")
    held[("b",)] = 2.0
    snapshot = metrics.snapshot()
    assert values(snapshot, "penstock_plain") == {(): 2}
    assert values(snapshot, "penstock_labelled") == {("a",): 1, ("b",): 2}


@pytest.mark.parametrize(
    ("value", "bucket"),
    [(-1.0, 0), (0.0, 0), (0.1, 0), (0.11, 1), (1.0, 1), (1.01, 2), (float("inf"), 2)],
)
def test_a_value_counts_in_the_first_bucket_whose_bound_it_does_not_exceed(value: float, bucket: int) -> None:
    cell = Metrics().histogram("penstock_x", "X", bounds=(0.1, 1.0)).labels()
    cell.observe(value)
    assert cell.counts == [int(index == bucket) for index in range(3)]


def test_label_values_past_the_bound_share_one_cell() -> None:
    metrics = Metrics()
    counter = metrics.counter("penstock_a_total", "A", "model", "user")
    histogram = metrics.histogram("penstock_b_seconds", "B", "model")
    for number in range(MAX_CELLS + 10):
        counter.inc(str(number), "u")
        histogram.labels(str(number)).observe(1)
    counted = values(metrics.snapshot(), "penstock_a_total")
    assert len(counted) == MAX_CELLS + 1
    assert counted[OVERFLOW, OVERFLOW] == 10
    assert values(metrics.snapshot(), "penstock_b_seconds")[OVERFLOW,] == 10
    counter.inc("0", "u")
    assert values(metrics.snapshot(), "penstock_a_total")["0", "u"] == 2


def test_snapshots_add_up_cell_by_cell() -> None:
    one = process({"a": 1, "b": 2}, [0.05, 0.5])
    other = process({"b": 3, "c": 4}, [0.05, 5.0, 50.0])
    merged = merge([one, other])
    assert values(merged, "penstock_requests_total") == {("a",): 1, ("b",): 5, ("c",): 4}
    assert values(merged, "penstock_open") == {(): 5}
    latency = next(family for family in merged if family.name == "penstock_latency_seconds")
    assert latency.samples[0].counts == [2, 1, 2]
    assert latency.samples[0].value == pytest.approx(55.6)


def test_merging_leaves_what_is_merged_alone() -> None:
    one, other = process({"a": 1}, [0.05]), process({"a": 1}, [0.05])
    before = msgspec.to_builtins(one)
    merge([one, other])
    assert msgspec.to_builtins(one) == before
    assert merge([one]) == one
    assert merge([]) == []


@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)), st.lists(st.integers(0, 9)))
    )
)
def test_the_order_of_merging_does_not_matter(
    work: list[tuple[dict[str, int], list[int]]],
) -> None:
    snapshots = [process({k: float(v) for k, v in r.items()}, list(map(float, lat))) for r, lat in work]

    def comparable(snapshot: Snapshot) -> object:
        return sorted((f.name, sorted((s.labels, s.value, s.counts) for s in f.samples)) for f in snapshot)

    assert comparable(merge(snapshots)) == comparable(merge(reversed(snapshots)))
    assert comparable(merge([merge(snapshots[:2]), *snapshots[2:]])) == comparable(merge(snapshots))


def test_a_snapshot_can_be_sent_to_another_process() -> None:
    snapshot = process({"a": 1}, [0.05])
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=list[FamilySnapshot])
    assert sent == snapshot
    assert values(merge([sent, snapshot]), "penstock_requests_total") == {("a",): 2}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("scheduler", "info", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_log_line_is_one_json_object(lines: io.StringIO) -> None:
    log = logging.getLogger("penstock.test")
    log.debug("not logged")
    log.info("placed %s\nsecond line", "r1", extra={"fields": {"instance": "a", "blocks": 3}})
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    first, second = map(msgspec.json.decode, lines.getvalue().splitlines())
    assert first | {"time": ""} == {
        "time": "",
        "level": "info",
        "service": "scheduler",
        "message": "placed r1\nsecond line",
        "instance": "a",
        "blocks": 3,
    }
    assert first["time"].endswith("Z")
    assert second["level"] == "error"
    assert "ValueError: broken" in second["error"]


def test_of_several_processes_a_gauge_is_their_sum_or_the_one_that_says_most() -> None:
    def process(age_s: float, connected: float, held: float) -> Snapshot:
        metrics = Metrics()
        metrics.gauge("age", "", lambda: age_s, over="max")
        metrics.gauge("connected", "", lambda: connected, over="min")
        metrics.gauge("held", "", lambda: held)
        metrics.level("level", "", "what").labels("a").value = held
        metrics.tally("counted_total", "", lambda: held)
        return metrics.snapshot()

    merged = merge([process(1, 1, 5), process(3, 0, 7)])
    assert {f.name: f.samples[0].value for f in merged} == {
        "age": 3,
        "connected": 0,
        "held": 12,
        "level": 12,
        "counted_total": 12,
    }
    assert {f.name: f.kind for f in merged}["counted_total"] == "counter"
    assert {f.name: f.kind for f in merged}["level"] == "gauge"


def test_what_is_declared_has_no_values_and_reads_none() -> None:
    metrics = Metrics()
    metrics.gauge("broken", "what it is", lambda: 1 / 0, "label")
    (family,) = metrics.declared()
    assert (family.name, family.kind, family.label_names, family.samples) == (
        "broken",
        "gauge",
        ("label",),
        [],
    )
