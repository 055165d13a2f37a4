"""Measures and what is built of them, by worked numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from penstock.common.messages import ScheduleRequest
from penstock.common.model import Endpoint, EngineLoad, Instance
from penstock.scheduler.bench import table_of
from penstock.scheduler.candidates import Candidates, part_of
from penstock.scheduler.decisions import Case
from penstock.scheduler.draws import seed_of
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.measures import (
    BusyTime,
    ExpectedTtft,
    KvUse,
    Latency,
    Measure,
    OtherSession,
    PrefillAhead,
    Requests,
    Served,
    UnmatchedBlocks,
)
from penstock.scheduler.policies.scorers import Least, Spread
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.pool import whole
from penstock.scheduler.view import ClusterView

CATALOG = Catalog(Thresholds())


def candidates(numbers: Mapping[str, Sequence[float]], matched: Sequence[int] = ()) -> Candidates:
    """Instances a, b, ... whose arrays hold these numbers."""
    count = len(matched) or len(next(iter(numbers.values())))
    view = ClusterView()
    instances = [Instance(id=i, endpoint=Endpoint("h", 1), models=("m",)) for i in "abcdefgh"[:count]]
    view.refresh(table_of(instances), lambda slots: None)
    pool = view.pool("m")
    assert pool is not None
    for name, values in numbers.items():
        getattr(view.loads, name)[pool.slots] = values
    view.loads.sum_up_all()
    slots = pool.slots.tolist()
    steps = [
        (blocks, sum(1 << slot for slot, held in zip(slots, matched, strict=True) if held >= blocks))
        for blocks in sorted({*matched} - {0})
    ]
    return Candidates(whole(pool).indexed(), view.loads, steps)


def case(blocks: int = 0, *, prompt: int = 0, session: str = "", decision: str = "d", run: int = 0) -> Case:
    hashes = [seed_of(f"block {number}") for number in range(blocks)]
    request = ScheduleRequest(decision, "r", "m", prompt_tokens=prompt, session=session, run_blocks=run)
    return Case(request, hashes, seed_of(decision))


def chosen(policy: str, one: Case, among: Candidates) -> str:
    profile = CATALOG.find(policy)
    return among.id(profile.picker.pick(one, among, profile.scores(one, among)))


@pytest.mark.parametrize(
    ("measure", "numbers", "matched", "one", "expected"),
    [
        (Requests(), {"requests": [4, 2, 0], "weight": [1, 2, 1]}, (), case(), [4, 1, 0]),
        # 1,000 tokens at 8,000 a second are 125 ms; a request in flight is half a step of 20 ms.
        (ExpectedTtft(), {"requests": [0, 5]}, (), case(prompt=1000), [125, 175]),
        (ExpectedTtft(), {"requests": [0, 5]}, (0, 8), case(10, prompt=1000), [125, 75]),
        (ExpectedTtft(), {"backlog_ms": [300, 0]}, (10, 0), case(10, prompt=1000), [300, 125]),
        (ExpectedTtft(), {"ranked_ms_per_token": [0.1, 0.4]}, (0, 5), case(10, prompt=1000), [100, 200]),
        (ExpectedTtft(), {"kv_wait_ms": [0, 500]}, (), case(), [0, 500]),
        (UnmatchedBlocks(), {}, (0, 3, 10), case(10), [10, 7, 0]),
        (Served(), {"served": [3000, 0], "tokens": [0, 500]}, (), case(), [3000, 1000]),
        (KvUse(), {"kv_used": [0.9, 0.1]}, (), case(), [0.9, 0.1]),
        # Llumnix: (used + not yet computed + this prompt) / total.
        (
            KvUse(projected=True),
            {"kv_used": [0.9, 0.1], "pending": [0, 50], "kv_size": [100, 100]},
            (),
            case(prompt=10),
            [1.0, 0.7],
        ),
        (PrefillAhead(), {"pending": [800, 800], "ms_per_token": [0.125, 0.5]}, (), case(), [100, 400]),
        # 100 output tokens at 20 ms, twice as busy as usual on b.
        (Latency(), {"requests": [1, 3], "usual": [1, 1]}, (), case(prompt=800), [2100, 4100]),
        (BusyTime(), {"busy": [0.5, 0.5], "requests": [0, 1]}, (), case(), [0.5, 1.0]),
        (OtherSession(), {"requests": [0, 0]}, (), case(), [0, 0]),
    ],
)
def test_measures_by_values(
    measure: Measure,
    numbers: dict[str, list[float]],
    matched: tuple[int, ...],
    one: Case,
    expected: list[float],
) -> None:
    among = candidates(numbers or {"requests": [0] * len(matched)}, matched)
    before = {name: getattr(among.loads, name).copy() for name in among.loads.NAMES}
    assert measure.of(one, among).tolist() == pytest.approx(expected)
    measure.of(one, among)[:] = -7
    assert measure.of(one, among).tolist() == pytest.approx(expected)
    assert all((getattr(among.loads, name) == numbers).all() for name, numbers in before.items())


def test_least_is_one_for_the_least_and_falls() -> None:
    scores = Least(KvUse()).score(case(), candidates({"kv_used": [0.0, 0.05, 0.95]}))
    assert scores.tolist() == pytest.approx([1, 0.5, 0.05])


# AIBrix's weighted lists: matches of 100, 50, 0 % and 4, 2, 0 running requests.
@pytest.mark.parametrize(
    ("strategy", "matched", "expected", "best"),
    [
        ("prefix-cache:3,least-request:1", (10, 5, 0), [0.75, 0.5, 0.25], "a"),
        ("prefix-cache:1,least-request:2", (10, 5, 0), [1 / 3, 0.5, 2 / 3], "c"),
        # Nothing matches: the prefix makes no difference, only load decides.
        ("prefix-cache:3,least-request:1", (0, 0, 0), [0.75, 0.875, 1.0], "c"),
        ("prefix-cache:1,least-request:0", (10, 5, 0), None, "a"),
    ],
)
def test_weighted_lists_by_the_reference_numbers(
    strategy: str, matched: tuple[int, ...], expected: list[float] | None, best: str
) -> None:
    among = candidates({"requests": [4, 2, 0]}, matched)
    if expected is not None:
        assert CATALOG.find(strategy).scores(case(10), among).tolist() == pytest.approx(expected)
    assert chosen(strategy, case(10), among) == best


def test_a_list_of_equals_scores_everybody_one() -> None:
    assert Spread(Requests()).score(case(), candidates({"requests": [3, 3]})).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("why", "policy", "numbers", "expected"),
    [
        ("fewest tokens served", "throughput", {"served": [5000, 100, 9000]}, "b"),
        ("least of the KV cache", "least-kv-cache", {"kv_used": [0.5, 0.9, 0.2]}, "c"),
        ("the fastest", "least-latency", {"tpot_ms": [30, 10, 20]}, "b"),
        (
            "the fastest, unless it is busier",
            "least-latency",
            {"tpot_ms": [30, 10, 20], "requests": [0, 9, 0]},
            "c",
        ),
        ("the idle one", "least-busy-time", {"busy": [0.9, 0.1, 0.5]}, "b"),
        ("least prefill ahead", "load-balance", {"pending": [9000, 0, 500]}, "b"),
        ("room for the prompt", "load-balance", {"kv_used": [0.9, 0.8, 0.1]}, "c"),
        ("least wait", "cache-aware", {"backlog_ms": [80, 900, 300]}, "a"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_each_strategy_chooses_by_what_it_looks_at(
    why: str, policy: str, numbers: dict[str, list[float]], expected: str
) -> None:
    among = candidates(numbers)
    assert {chosen(policy, case(prompt=100, decision=f"d{n}"), among) for n in range(10)} == {expected}, why


def test_cache_aware_leaves_a_match_when_waiting_for_it_costs_more_than_computing() -> None:
    # 8,000 tokens take a second; a holds three quarters of them.
    for backlog_ms, expected in ((700, "a"), (800, "b")):
        among = candidates({"backlog_ms": [backlog_ms, 0]}, (15, 0))
        assert chosen("cache-aware", case(20, prompt=8000), among) == expected


def test_a_session_stays_and_another_moves_only_if_its_instance_left() -> None:
    before, after = candidates({"requests": [0, 9, 5, 2]}), candidates({"requests": [0, 9, 5]})
    places = {}
    for number in range(300):
        one = case(session=f"s{number}", decision=f"d{number}")
        places[number] = chosen("session-affinity", one, before)
        again = case(session=f"s{number}", decision=f"other {number}")
        assert chosen("session-affinity", again, before) == places[number]
        if places[number] != "d":
            assert chosen("session-affinity", one, after) == places[number]
    assert all(50 < list(places.values()).count(name) < 100 for name in "abcd")


def test_without_a_session_the_fewest_requests_decide() -> None:
    among = candidates({"requests": [3, 9, 1]})
    assert {chosen("session-affinity", case(decision=f"d{n}"), among) for n in range(10)} == {"c"}


def test_least_request_goes_by_weight() -> None:
    among = candidates({"requests": [4, 6, 5], "weight": [1, 2, 1]})
    assert chosen("least-request", case(), among) == "b"


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), -1.0, 1e300])
def test_absurd_numbers_of_an_engine_change_no_pick(figure: float) -> None:
    view = ClusterView()
    instances = [Instance(id=i, endpoint=Endpoint("h", 1), models=("m",)) for i in "abc"]
    view.refresh(table_of(instances), lambda slots: None)
    view.advance(10.0)
    pool = view.pool("m")
    assert pool is not None
    view.take([("a", 9, 900, 500), ("b", 1, 100, 0), ("c", 5, 500, 0)])
    # As if nothing had checked it on the way.
    absurd = EngineLoad(figure, figure, figure, figure, 16)  # type: ignore[arg-type]  # what is tested
    view.take_status("b", absurd, 10.0)
    view.advance(11.0)
    for name in view.loads.NAMES:
        numbers = getattr(view.loads, name)[pool.slots]
        assert not np.isnan(numbers).any(), name
        assert (numbers >= 0).all() or name in ("status_at", "kv_at"), name
    among = Candidates(whole(pool), view.loads)
    for policy in ("cache-aware", "least-kv-cache", "load-balance", "least-request", "throughput"):
        assert chosen(policy, case(prompt=100), among) == "b", policy


@pytest.mark.parametrize(
    ("blocks", "run", "matched", "part"),
    [
        (10, 0, 5, (5, 10)),
        (64, 64, 5, (5, 64)),
        (128, 64, 64, (64, 64 + 128)),
        (130, 64, 128, (64 + 128, 64 + 128 + 2 * 4)),
        (130, 64, 65, (64 + 2, 64 + 128 + 2 * 4)),
        (130, 0, 65, (65, 130)),
    ],
)
def test_blocks_count_by_their_size_which_doubles_after_each_run(
    blocks: int, run: int, matched: int, part: tuple[int, int]
) -> None:
    one = case(blocks, prompt=1000, run=run)
    assert part_of(one, matched) == part
    held = candidates({}, [matched, 0])
    assert held.shares(one) == pytest.approx([part[0] / part[1], 0.0])
    uncached = 1000 * (1 - part[0] / part[1])
    assert ExpectedTtft().of(one, held) == pytest.approx([uncached * 0.125, 125.0])


def test_runs_without_end_are_counted() -> None:
    part, whole = part_of(case(2048, run=1), 2047)
    assert 0 < part < whole
