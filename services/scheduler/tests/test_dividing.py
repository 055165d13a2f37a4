"""Pairs of prefill and decode: which instances, in which groups, in one call or two."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from penstock.common.bus import Entry, Listing, Position
from penstock.common.identity import Identity
from penstock.common.instances import encode_instance, instance_key
from penstock.common.messages import (
    InFlight,
    LoadReport,
    Mode,
    Placement,
    Reason,
    Rejection,
    ScheduleBatch,
    ScheduleRequest,
    Stage,
)
from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.common.profile_sources import ProfileSources
from penstock.common.profiles import read_document
from penstock.scheduler.decisions import Decision
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.configured import ConfiguredCatalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.profile import Division
from penstock.scheduler.replica import Replica

PROMPT = struct.pack("<8Q", *(n << 8 for n in range(1, 9)))


def instance(name: str, **more: Any) -> Instance:
    role = {"p": Role.PREFILL, "d": Role.DECODE}.get(name[0], Role.NEUTRAL)
    return Instance(id=name, endpoint=Endpoint("h", 1), models=("m",), role=role, engine="vllm", **more)


def replica(
    *instances: Instance,
    max_requests: int = 0,
    catalog: Catalog | None = None,
    division: Division = Division(),  # noqa: B008  # frozen
) -> Replica:
    catalog = catalog or Catalog(Thresholds(max_requests=max_requests))
    one = Replica(Identity("scheduler", "s", "1"), catalog, "cache-aware", 10_000, "", division)
    entries = {instance_key(i.id): Entry(encode_instance(i), n) for n, i in enumerate(instances, 1)}
    one.registry(Listing(Position("b", len(entries)), entries))
    return one


def request(name: str = "d1", mode: Mode = Mode.PD_BATCH, **more: Any) -> ScheduleRequest:
    plain = ScheduleRequest(name, "r", "m", prompt_tokens=800, mode=mode)
    return msgspec.structs.replace(plain, **more)


def place(one: Replica, wanted: ScheduleRequest, now: float = 0.0) -> tuple[Placement, Decision]:
    """Decided and reserved."""
    decision = one.decide(wanted, now)
    one.reserve(ScheduleBatch("i", "1", 50.0, (wanted,)), wanted, decision, now)
    assert isinstance(decision.outcome, Placement), decision.outcome
    return decision.outcome, decision


def refused(one: Replica, wanted: ScheduleRequest) -> Rejection:
    outcome = one.decide(wanted, 0.0).outcome
    assert isinstance(outcome, Rejection), outcome
    return outcome


def requests_at(one: Replica, name: str) -> float:
    slot = one.view.slot(name)
    assert slot is not None
    return float(one.view.loads.requests[slot])


def test_one_call_gives_both_instances_and_counts_at_both() -> None:
    one = replica(instance("p1"), instance("d1"))
    wanted = request()
    decision = one.decide(wanted, 0.0)
    placed = one.reserve(ScheduleBatch("i", "1", 50.0, (wanted,)), wanted, decision, 0.0)
    assert isinstance(decision.outcome, Placement)
    assert (decision.outcome.prefill_instance, decision.outcome.instance) == ("p1", "d1")
    told = [(p.decision_id, p.instance, p.tokens, p.uncached_tokens) for p in placed]
    assert told == [("d1+p", "p1", 800, 800), ("d1", "d1", 800, 0)]
    assert (requests_at(one, "p1"), requests_at(one, "d1")) == (1, 1)


def test_both_parts_end_as_their_ingress_says() -> None:
    one = replica(instance("p1"), instance("d1"))
    place(one, request())
    entries = InFlight("d1+p", "p1", 800), InFlight("d1", "d1", 800)
    one.report(LoadReport("i", "1", 1, in_flight=entries), 0.1)
    one.report(LoadReport("i", "1", 2, finished=("d1+p",)), 0.2)
    assert (requests_at(one, "p1"), requests_at(one, "d1")) == (0, 1)
    one.report(LoadReport("i", "1", 3, finished=("d1",)), 0.3)
    assert one.ledger.in_flight == 0


def test_prefill_goes_where_the_prompt_is_and_decode_where_there_is_room() -> None:
    one = replica(*map(instance, ("p1", "p2", "p3", "d1", "d2")))
    first, _ = place(one, request("d1", block_hashes=PROMPT))
    second, decision = place(one, request("d2", block_hashes=PROMPT), 5.0)
    assert second.prefill_instance == first.prefill_instance
    assert second.matched_blocks == 8
    assert {first.instance, second.instance} == {"d1", "d2"}
    assert decision.prefill is not None
    assert decision.prefill.terms[0].instance == first.prefill_instance


def test_only_instances_of_one_group_pair_up() -> None:
    fleet = [instance(f"{role}{group}", group=group) for role in "pd" for group in "abc"]
    one = replica(*fleet)
    for number in range(30):
        pair, _ = place(one, request(f"x{number}"))
        assert pair.prefill_instance[1:] == pair.instance[1:]


def test_without_a_group_the_engine_is_what_pairs() -> None:
    sglang = Instance(
        id="d-sglang", endpoint=Endpoint("h", 1), models=("m",), role=Role.DECODE, engine="sglang"
    )
    one = replica(instance("p1"), instance("d1"), sglang)
    assert {place(one, request(f"x{n}"))[0].instance for n in range(8)} == {"d1"}


def test_prefill_begins_only_where_its_group_has_room_to_decode() -> None:
    one = replica(
        *(instance(f"{role}{group}", group=group) for role in "pd" for group in "ab"), max_requests=2
    )
    pairs = [place(one, request(f"x{n}"))[0].prefill_instance for n in range(4)]
    assert sorted(pairs) == ["pa", "pa", "pb", "pb"]
    assert refused(one, request("x4")).reason is Reason.SATURATED


@pytest.mark.parametrize("mode", [Mode.PD_BATCH, Mode.PD_STAGED])
def test_without_a_pair_one_instance_does_it_all(mode: Mode) -> None:
    stage = Stage.PREFILL if mode is Mode.PD_STAGED else Stage.ONLY
    alone, _ = place(replica(instance("p1"), instance("n1")), request(mode=mode, stage=stage))
    assert (alone.instance, alone.prefill_instance) == ("n1", "")
    drained = instance("p1", state=InstanceState.DRAINING)
    alone, _ = place(replica(drained, instance("d1")), request(mode=mode, stage=stage))
    assert (alone.instance, alone.prefill_instance) == ("d1", "")
    assert refused(replica(instance("p1")), request(mode=mode, stage=stage)).reason is Reason.NO_INSTANCE


def test_a_plain_request_goes_to_neutral_instances_else_to_those_that_decode() -> None:
    plain = request(mode=Mode.NEUTRAL)
    assert place(replica(instance("p1"), instance("d1"), instance("n1")), plain)[0].instance == "n1"
    assert place(replica(instance("p1"), instance("d1")), plain)[0].instance == "d1"


def test_little_to_compute_is_not_divided() -> None:
    one = replica(instance("p1"), instance("d1"), division=Division(200))
    first, _ = place(one, request("x1", block_hashes=PROMPT))
    assert first.prefill_instance == "p1"
    again, _ = place(one, request("x2", block_hashes=PROMPT))
    assert (again.instance, again.prefill_instance) == ("d1", "")
    other = struct.pack("<8Q", *(n << 16 for n in range(1, 9)))
    assert place(one, request("x3", block_hashes=other))[0].prefill_instance == "p1"


def by_profile(
    *instances: Instance,
    division: Division = Division(),  # noqa: B008  # frozen
    profile: dict[str, Any] | None = None,
    **said: Any,
) -> Replica:
    """A replica under a config profile that says so, and so of disaggregation."""
    catalog = ConfiguredCatalog(Thresholds())
    document = read_document({"profiles": {"default": {**(profile or {}), "disaggregation": said}}})
    catalog.configure({"m": document}, ProfileSources(catalog.fault))
    return replica(*instances, division=division, catalog=catalog)


@pytest.mark.parametrize(("flag", "said", "divided"), [(0, 900, False), (900, 0, True), (900, None, False)])
def test_the_profiles_threshold_counts_before_the_flag(flag: int, said: int | None, divided: bool) -> None:
    told: dict[str, Any] = {} if said is None else {"skip_below_tokens": said}
    one = by_profile(instance("p1"), instance("d1"), division=Division(flag), **told)
    assert bool(place(one, request())[0].prefill_instance) is divided


@pytest.mark.parametrize("mode", [Mode.PD_BATCH, Mode.PD_STAGED])
def test_neutral_instances_take_what_they_answer_sooner_where_the_profile_says(mode: Mode) -> None:
    stage = Stage.PREFILL if mode is Mode.PD_STAGED else Stage.ONLY
    fleet = [instance(name) for name in ("p1", "d1", "n1")]
    for one, wanted in ((replica(*fleet), "p1p1"), (by_profile(*fleet, neutral=True), "p1n1")):
        # Nobody has anything to do: the pair takes it. The next prompt would wait for that one at prefill.
        placed = [place(one, request(f"x{n}", mode, stage=stage))[0] for n in range(2)]
        assert "".join(p.prefill_instance or p.instance for p in placed) == wanted


@pytest.mark.parametrize(("decoding", "by"), [(1, "n1"), (2, "p1")])
def test_a_neutral_instance_that_holds_more_than_those_that_decode_takes_none(decoding: int, by: str) -> None:
    one = by_profile(*(instance(name) for name in ("p1", "d1", "n1")), neutral=True)
    for number in range(decoding):
        place(one, request(f"w{number}", Mode.NEUTRAL, prompt_tokens=0))
    # Prefill has a prompt to compute, d1 one to decode.
    assert place(one, request("x1"))[0].prefill_instance == "p1"
    placed, _ = place(one, request("x2"))
    assert (placed.prefill_instance or placed.instance) == by


def test_stages_are_placed_one_after_the_other_by_replicas_that_never_met() -> None:
    fleet = [instance(f"{role}{group}", group=group) for role in "pd" for group in "ab"]
    first, _ = place(replica(*fleet), request("x1", Mode.PD_STAGED, stage=Stage.PREFILL))
    assert first.instance == first.prefill_instance
    second = request(
        "x2",
        Mode.PD_STAGED,
        stage=Stage.DECODE,
        prefill_instance=first.instance,
        prefill_group=first.instance[1:],
    )
    assert place(replica(*fleet), second)[0].instance == "d" + first.instance[1:]
    # Prefill's instance has left the registry meanwhile: the request says which group it was of.
    left = [one for one in fleet if one.id != first.instance]
    assert place(replica(*left), second)[0].instance == "d" + first.instance[1:]


def test_decode_without_an_instance_of_the_group_is_refused() -> None:
    wanted = request("x2", Mode.PD_STAGED, stage=Stage.DECODE, prefill_instance="pa", prefill_group="a")
    refusal = refused(replica(instance("pa", group="a"), instance("db", group="b")), wanted)
    assert refusal.reason is Reason.NO_INSTANCE
    assert "other-group 1" in refusal.message


def test_the_strategy_pd_leaves_the_policy_to_the_default() -> None:
    one = replica(instance("p1"), instance("d1"))
    assert place(one, request(strategy="pd"))[0].policy == "cache-aware"
    assert place(one, request(strategy="pd", mode=Mode.NEUTRAL))[0].policy == "cache-aware"


@pytest.mark.parametrize("mode", list(Mode))
def test_bad_requests_are_refused_alike_in_every_mode(mode: Mode) -> None:
    one = replica(instance("p1"), instance("d1"))
    assert refused(one, request(mode=mode, strategy="no-such")).reason is Reason.BAD_STRATEGY
    assert refused(one, request(mode=mode, block_hashes=b"123")).reason is Reason.BAD_REQUEST
    assert refused(one, request(mode=mode, model="other")).reason is Reason.UNKNOWN_MODEL
