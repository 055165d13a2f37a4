"""Guards against imbalance among prefill and among decode instances, with the numbers of AIBrix's `pd`."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.identity import Identity
from penstock.common.messages import InFlight, LoadReport, Mode, ScheduleRequest, Stage
from penstock.common.model import Instance
from penstock.common.telemetry import Metrics
from penstock.scheduler.explaining import FULL, Explaining
from penstock.scheduler.instruments import Instruments
from penstock.scheduler.profile import Division
from penstock.scheduler.replica import Replica

from .test_dividing import PROMPT, by_profile, instance, place, replica, request

GUARDS = Division(prefill_imbalance=16, decode_imbalance=16)
STAGES = [(Mode.PD_BATCH, Stage.ONLY), (Mode.PD_STAGED, Stage.PREFILL)]


def load(one: Replica, **requests: int) -> None:
    """So many requests in flight on each, of no tokens."""
    entries = tuple(
        InFlight(f"{name}.{n}", name, 0) for name, count in requests.items() for n in range(count)
    )
    one.report(LoadReport("i", "1", 1, in_flight=tuple(entries)), 0.0)


def fleet(*names: str, **more: Any) -> list[Instance]:
    return [instance(name, **more) for name in names]


def long(**more: Any) -> ScheduleRequest:
    """PROMPT, whose computing takes longer than anything that is in flight."""
    return request("x", **{"block_hashes": PROMPT, "prompt_tokens": 80_000, **more})


def warm(one: Replica, holder: str) -> None:
    """`holder` is the prefill instance that holds PROMPT."""
    slot = one.view.slot(holder)
    assert slot is not None
    hashes = one.decide(request("w", block_hashes=PROMPT), 0.0).hashes
    one.index.insert(hashes, slot)


@pytest.mark.parametrize(("mode", "stage"), STAGES)
@pytest.mark.parametrize(("in_flight", "chosen"), [((17, 1), "p1"), ((18, 1), "p2")])
def test_prefill_goes_to_the_prefix_until_its_load_is_more_than_16_above_the_least(
    mode: Mode, stage: Stage, in_flight: tuple[int, int], chosen: str
) -> None:
    one = replica(*fleet("p1", "p2", "d1"), division=GUARDS)
    warm(one, "p1")
    load(one, p1=in_flight[0], p2=in_flight[1])
    placed, decision = place(one, long(mode=mode, stage=stage))
    assert placed.prefill_instance == chosen
    of_prefill = decision.prefill or decision
    assert of_prefill.excluded.get("imbalance", 0) == (chosen == "p2")


@pytest.mark.parametrize(("in_flight", "dropped"), [((16, 1), 0), ((17, 1), 1)])
@pytest.mark.parametrize("staged", [False, True])
def test_decode_is_the_least_loaded_from_a_difference_of_16_on(
    staged: bool, in_flight: tuple[int, int], dropped: int
) -> None:
    one = replica(*fleet("p1", "d1", "d2"), division=GUARDS)
    load(one, d1=in_flight[0], d2=in_flight[1])
    more = {"prefill_instance": "p1", "stage": Stage.DECODE} if staged else {}
    placed, decision = place(one, request("x", Mode.PD_STAGED if staged else Mode.PD_BATCH, **more))
    assert decision.excluded.get("imbalance", 0) == dropped
    assert placed.instance == "d2" or not dropped


def test_among_equally_loaded_prefill_instances_the_prefix_counts() -> None:
    one = replica(*fleet("p1", "p2", "p3", "d1"), division=GUARDS)
    warm(one, "p2")
    load(one, p1=40, p2=2, p3=2)
    assert place(one, long())[0].prefill_instance == "p2"


def test_the_other_half_comes_from_the_group_of_the_least_loaded() -> None:
    groups = [*fleet("pa", "da", group="a"), *fleet("pb", "db", group="b")]
    one = replica(*groups, division=GUARDS)
    warm(one, "pa")
    load(one, pa=20)
    assert place(one, long())[0].instance == "db"
    one = replica(*groups, division=GUARDS)
    warm(one, "pa")
    load(one, da=20)
    placed, _ = place(one, long())
    assert (placed.prefill_instance, placed.instance) == ("pb", "db")


def test_an_idle_instance_without_a_partner_is_no_reason_to_move() -> None:
    one = replica(*fleet("pa", "pb", "da", group="a"), instance("dc", group="c"), division=GUARDS)
    load(one, da=20)
    placed, decision = place(one, request("x"))
    assert placed.instance == "da"
    assert "imbalance" not in decision.excluded


@pytest.mark.parametrize(
    ("flags", "said", "guarded"),
    [
        (GUARDS, {}, True),
        (GUARDS, {"prefill_imbalance": 30}, False),
        (GUARDS, {"prefill_imbalance": 0}, False),
        (Division(prefill_imbalance=0), {}, False),
        (Division(prefill_imbalance=0), {"prefill_imbalance": 5}, True),
    ],
)
def test_the_profiles_guard_counts_before_the_flag(
    flags: Division, said: dict[str, Any], guarded: bool
) -> None:
    one = by_profile(*fleet("p1", "p2", "d1"), division=flags, **said)
    warm(one, "p1")
    load(one, p1=18, p2=1)
    placed, _ = place(one, long())
    assert placed.prefill_instance == ("p2" if guarded else "p1")


def test_what_the_guards_did_is_explained_and_counted() -> None:
    one = replica(*fleet("p1", "p2", "d1", "d2"), division=GUARDS)
    warm(one, "p1")
    load(one, p1=18, d1=30)
    metrics = Metrics()
    instruments = Instruments(metrics, one)
    explaining = Explaining(Identity("scheduler", "s", "1"), one, FULL, {})
    told = explaining._on_now(long(), 0.0).decisions[0]
    assert b'"imbalance":1' in told
    assert b'"prefill-imbalance":1' in told
    assert b"same pick, same score" in told
    decision = one.decide(long(), 0.0)
    instruments.decided(decision, 0.0)
    families = {family.name: family for family in metrics.snapshot()}
    samples = families["penstock_scheduler_pair_imbalances_total"].samples
    counts = {sample.labels: sample.value for sample in samples}
    assert counts == {("prefill",): 1, ("decode",): 1}


@pytest.mark.parametrize(("in_flight", "chosen"), [((120, 100), "p1"), ((140, 60), "p2")])
def test_among_hundreds_the_difference_must_be_a_share_of_the_mean_too(
    in_flight: tuple[int, int], chosen: str
) -> None:
    one = replica(*fleet("p1", "p2", "d1"), division=GUARDS)
    warm(one, "p1")
    load(one, p1=in_flight[0], p2=in_flight[1])
    assert place(one, long(prompt_tokens=1_000_000))[0].prefill_instance == chosen
