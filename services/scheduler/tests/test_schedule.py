"""schedule(): who is a candidate, what is answered, what the log gets to know."""

from __future__ import annotations

import struct

import msgspec
import pytest

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.model import Endpoint, EngineLoad, Instance, InstanceState, Role
from penstock.scheduler.bench import table_of
from penstock.scheduler.decisions import Decision
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import STRATEGIES, Thresholds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.scheduler import schedule
from penstock.scheduler.view import ClusterView

DEFAULTS = Thresholds()


def instance(
    name: str,
    *,
    model: str = "m",
    owner: str = "",
    role: Role = Role.NEUTRAL,
    state: InstanceState = InstanceState.READY,
    labels: dict[str, str] | None = None,
) -> Instance:
    return Instance(
        id=name,
        endpoint=Endpoint("h", 1),
        models=(model,),
        owner=owner,
        role=role,
        state=state,
        labels=labels or {},
    )


FLEET = (
    instance("a", owner="x"),
    instance("b", owner="y"),
    instance("stale", owner="x", state=InstanceState.STALE),
    instance("draining", owner="x", state=InstanceState.DRAINING),
    instance("sick", state=InstanceState.UNHEALTHY),
    instance("prefill", owner="x", role=Role.PREFILL),
    instance("decode", role=Role.DECODE),
    instance("other", model="n", state=InstanceState.DRAINING),
)


def packed(*hashes: int) -> bytes:
    """As on the wire; their lowest four bits do not matter."""
    return struct.pack(f"<{len(hashes)}Q", *(block << 4 for block in hashes))


class Desk:
    """A view and an index to decide on."""

    def __init__(
        self, *instances: Instance, thresholds: Thresholds = DEFAULTS, domain_label: str = ""
    ) -> None:
        self.view, self.index = ClusterView(domain_label=domain_label), PrefixIndex(1000)
        self.catalog = Catalog(thresholds)
        self.view.refresh(table_of(instances or FLEET), self.index.forget)

    def decide(self, request: ScheduleRequest, default: str = "least-request") -> Decision:
        return schedule(request, self.view, self.index, self.catalog, default=default, replicas=1)


def request(decision: str = "d", **more: object) -> ScheduleRequest:
    return msgspec.structs.replace(ScheduleRequest(decision, "r", "m"), **more)


def places(desk: Desk, **more: object) -> set[str]:
    outcomes = [desk.decide(request(f"d{number}", **more)).outcome for number in range(40)]
    return {outcome.instance for outcome in outcomes if isinstance(outcome, Placement)}


def test_only_instances_that_may_serve_the_request_are_candidates() -> None:
    desk = Desk()
    assert places(desk) == {"a", "b", "stale"}
    assert places(desk, owner="x") == {"a", "stale"}
    assert places(desk, excluded=("a", "unheard of")) == {"b", "stale"}
    assert places(desk, owner="x", excluded=("a",)) == {"stale"}


def test_a_placement_says_what_was_dropped_and_by_which_filter() -> None:
    decision = Desk().decide(request(owner="x", excluded=("a",)))
    assert isinstance(decision.outcome, Placement)
    assert decision.excluded == {"owner": 3, "role": 1, "not-taking-work": 1, "excluded": 1}


@pytest.mark.parametrize(
    ("asked", "reason", "says"),
    [
        ({"model": "nope"}, Reason.UNKNOWN_MODEL, "'nope'"),
        ({"owner": "z"}, Reason.UNKNOWN_MODEL, "owners: x, y"),
        ({"model": "n"}, Reason.NO_INSTANCE, "not-taking-work 1"),
        ({"excluded": ("a", "b", "stale")}, Reason.NO_INSTANCE, "excluded 3"),
        (
            {"strategy": "fastest"},
            Reason.BAD_STRATEGY,
            "'fastest'; one of: cache-aware, prefix-cache, least-request",
        ),
        ({"strategy": "\U000e0001" * 512}, Reason.BAD_STRATEGY, "unknown"),
        ({"block_hashes": b"1234567"}, Reason.BAD_REQUEST, "block_hashes"),
    ],
)
def test_a_rejection_names_its_reason(asked: dict[str, object], reason: Reason, says: str) -> None:
    decision = Desk().decide(msgspec.structs.replace(request(), **asked))
    assert isinstance(decision.outcome, Rejection)
    assert decision.outcome.reason is reason
    assert says in decision.outcome.message
    assert len(decision.outcome.message) <= 2048
    assert decision.slot == -1


@pytest.mark.parametrize("policy", STRATEGIES)
def test_the_request_chooses_the_policy_and_the_answer_names_it(policy: str) -> None:
    desk = Desk()
    for decision in (desk.decide(request(strategy=policy)), desk.decide(request(), default=policy)):
        assert isinstance(decision.outcome, Placement)
        assert decision.outcome.policy == decision.policy == policy


def test_the_best_candidates_are_shown_with_what_spoke_for_them() -> None:
    desk = Desk(*(instance(name) for name in "abcd"))
    desk.view.take([("a", 4, 0, 0), ("b", 1, 0, 0), ("c", 3, 0, 0), ("d", 0, 0, 0)])
    slot = desk.view.slot("c")
    assert slot is not None
    desk.index.insert([1, 2], slot)
    decision = desk.decide(request(strategy="prefix-cache", block_hashes=packed(1, 2, 3)))
    shown = [(term.instance, term.in_flight, term.matched_blocks) for term in decision.terms]
    assert shown == [("c", 3, 2), ("d", 0, 0), ("b", 1, 0)]
    scores = [term.score for term in decision.terms]
    assert scores == sorted(scores, reverse=True)
    assert decision.outcome == Placement("d", "c", policy="prefix-cache", matched_blocks=2)


def test_the_chosen_one_is_shown_first_even_if_it_is_not_the_best() -> None:
    desk = Desk(*(instance(name) for name in "ab"))
    desk.view.take([("a", 9, 0, 0)])
    decisions = [desk.decide(request(f"d{n}", strategy="random")) for n in range(10)]
    for decision in decisions:
        assert isinstance(decision.outcome, Placement)
        assert decision.terms[0].instance == decision.outcome.instance
        assert len(decision.terms) == 2


def test_every_policy_tells_how_much_of_the_prompt_its_choice_holds() -> None:
    desk = Desk(instance("a"))
    desk.index.insert([1, 2], 0)
    for policy in STRATEGIES:
        outcome = desk.decide(request(strategy=policy, block_hashes=packed(1, 2, 3))).outcome
        assert isinstance(outcome, Placement)
        assert outcome.matched_blocks == 2


def test_deciding_changes_nothing() -> None:
    desk = Desk()
    asked = request(strategy="prefix-cache", block_hashes=packed(1, 2, 3))
    decisions = [desk.decide(asked) for _ in range(3)]
    assert decisions[0] == decisions[1] == decisions[2]
    assert len(desk.index) == 0
    assert desk.view.loads.requests.sum() == 0


def test_owners_from_hostile_clients_are_not_kept_without_bound() -> None:
    desk = Desk()
    for number in range(1000):
        desk.decide(request(owner=f"owner {number}"))
    pool = desk.view.pool("m")
    assert pool is not None
    assert len(pool.standing) <= 256
    assert places(desk, owner="x") == {"a", "stale"}


@pytest.mark.parametrize(
    ("why", "flag", "label", "in_flight", "expected"),
    [
        ("no limit", 0, "", [900, 900], {"a", "b"}),
        ("the flag's", 4, "", [4, 3], {"b"}),
        ("its own label's", 0, "2", [2, 900], {"b"}),
        ("its own label's before the flag's", 4, "10", [9, 4], {"a"}),
        ("a label without sense", 4, "-1", [4, 3], {"b"}),
        ("a label without sense", 4, "0", [4, 3], {"b"}),
        ("a label without sense", 4, "1e9", [4, 3], {"b"}),
    ],
)
@pytest.mark.parametrize("policy", ["cache-aware", "random", "prefix-cache:1,least-request:1"])
def test_an_instance_at_its_limit_takes_no_more(
    why: str, flag: int, label: str, in_flight: list[int], expected: set[str], policy: str
) -> None:
    labels = {"penstock/max-requests": label} if label else {}
    fleet = instance("a", labels=labels), instance("b")
    desk = Desk(*fleet, thresholds=Thresholds(max_requests=flag))
    desk.view.take([("a", in_flight[0], 0, 0), ("b", in_flight[1], 0, 0)])
    for _ in range(20):
        assert places(desk, strategy=policy) <= expected, why


@pytest.mark.parametrize(
    ("tokens", "prompt", "dropped"),
    [((800, 100), 200, 0), ((801, 100), 200, 1), ((801, 1000), 200, 2), ((0, 1), 5000, 1)],
)
def test_an_instance_takes_no_more_tokens_than_its_kv_cache_holds(
    tokens: tuple[int, int], prompt: int, dropped: int
) -> None:
    desk = Desk(instance("a"), instance("b"), instance("unknown"), thresholds=Thresholds(max_kv_ratio=1.0))
    for name, held in zip("ab", tokens, strict=True):
        desk.view.take_status(name, EngineLoad(kv_blocks=100, block_size=10), 0.0)
        desk.view.take([(name, min(1, held), held, 0)])
    desk.view.take([("unknown", 1, 10**6, 0)])
    decision = desk.decide(request(prompt_tokens=prompt))
    assert decision.excluded.get("saturated", 0) == dropped


def test_with_no_room_for_its_tokens_a_request_is_refused_as_saturated() -> None:
    desk = Desk(instance("a"), thresholds=Thresholds(max_kv_ratio=0.5))
    desk.view.take_status("a", EngineLoad(kv_blocks=100, block_size=10), 0.0)
    desk.view.take([("a", 1, 400, 0)])
    decision = desk.decide(request(prompt_tokens=101))
    assert isinstance(decision.outcome, Rejection)
    assert (decision.outcome.reason, decision.excluded) == (Reason.SATURATED, {"saturated": 1})
    assert places(desk, prompt_tokens=100) == {"a"}


def test_with_everybody_at_the_limit_the_request_is_refused_as_saturated() -> None:
    desk = Desk(instance("a"), instance("b"), instance("c"), thresholds=Thresholds(max_requests=4))
    desk.view.take([("a", 4, 0, 0), ("b", 9, 0, 0)])
    decision = desk.decide(request(excluded=("c",)))
    assert isinstance(decision.outcome, Rejection)
    assert decision.outcome.reason is Reason.SATURATED
    assert decision.outcome.retry_after_s > 0
    assert decision.excluded == {"excluded": 1, "saturated": 2}
    desk.view.take([("b", 3, 0, 0)])
    assert places(desk, excluded=("c",)) == {"b"}


def test_instances_of_a_failing_domain_leave_together_while_others_are_left() -> None:
    sick = instance("sick", model="other", state=InstanceState.UNHEALTHY, labels={"host": "h1"})
    near = instance("near", labels={"host": "h1"})
    far, bare = instance("far", labels={"host": "h2"}), instance("bare")
    drained = instance("drained", state=InstanceState.DRAINING, labels={"host": "h2"})
    desk = Desk(sick, near, far, bare, drained, domain_label="host")
    assert places(desk) == {"far", "bare"}
    decision = desk.decide(request())
    assert decision.excluded["failover-domain"] == 1
    assert places(Desk(sick, near, far, bare, drained)) == {"near", "far", "bare"}
    assert places(Desk(sick, near, domain_label="host")) == {"near"}


def test_a_placement_says_how_much_of_the_prompt_need_not_be_computed() -> None:
    desk = Desk(instance("a"))
    desk.index.insert([1, 2], 0)
    for blocks, tokens in (((1, 2, 3), 200), ((3, 1), 0), ((), 0), ((1, 2), 300)):
        outcome = desk.decide(request(prompt_tokens=300, block_hashes=packed(*blocks))).outcome
        assert isinstance(outcome, Placement)
        assert outcome.matched_tokens == tokens
