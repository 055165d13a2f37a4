"""Prompt lengths and neutral instances beside pairs, by profile; AIBrix tests its buckets likewise."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.common.messages import Mode, Reason, Stage
from penstock.common.model import Instance
from penstock.scheduler.replica import Replica

from .test_dividing import by_profile, instance, place, refused, request


def bucketed(*instances: Instance, **said: Any) -> Replica:
    """A replica under a profile with prompt lengths by the label `tier`."""
    buckets = [
        {"labels": {"tier": "short"}, "max_tokens": 15},
        {"labels": {"tier": "medium"}, "min_tokens": 16, "max_tokens": 32},
    ]
    return by_profile(*instances, profile={"prompt_buckets": buckets}, **said)


def tiered(tier: str, **more: Any) -> list[Instance]:
    """A prefill and a decode instance of one group, for prompts of a length."""
    labels = {"tier": tier}
    return [instance(f"{role}-{tier}", group=tier, labels=labels, **more) for role in "pd"]


COMBINED = instance("n1")
BOTH_MODES = pytest.mark.parametrize(
    ("mode", "stage"), [(Mode.PD_BATCH, Stage.ONLY), (Mode.PD_STAGED, Stage.PREFILL)]
)


@BOTH_MODES
@pytest.mark.parametrize(("tokens", "by"), [(10, "p-short"), (15, "p-short"), (20, "p-medium"), (40, "n1")])
def test_prompts_go_to_the_pair_of_their_length_else_to_a_neutral_instance(
    mode: Mode, stage: Stage, tokens: int, by: str
) -> None:
    one = bucketed(*tiered("short"), *tiered("medium"), COMBINED)
    for number in range(4):
        placed, _ = place(one, request(f"x{number}", mode, stage=stage, prompt_tokens=tokens))
        assert (placed.prefill_instance or placed.instance) == by
        if mode is Mode.PD_BATCH and placed.prefill_instance:
            assert placed.instance[1:] == by[1:]


@BOTH_MODES
def test_a_pair_of_which_half_takes_the_length_is_none(mode: Mode, stage: Stage) -> None:
    # Prefill there would have nobody to decode for it.
    fleet = [instance("p1", labels={"tier": "medium"}), instance("d1", labels={"tier": "short"}), COMBINED]
    placed, _ = place(bucketed(*fleet), request("x", mode, stage=stage, prompt_tokens=20))
    assert (placed.instance, placed.prefill_instance) == ("n1", "")


@BOTH_MODES
def test_no_prompt_goes_to_a_pair_of_another_length(mode: Mode, stage: Stage) -> None:
    rejection = refused(
        bucketed(*tiered("short"), *tiered("medium")), request("x", mode, stage=stage, prompt_tokens=40)
    )
    assert rejection.reason is Reason.NO_INSTANCE
    assert "prompt-length 2" in rejection.message


def test_the_second_stage_keeps_to_the_length_too() -> None:
    fleet = [
        instance(name, group="g", labels={"tier": tier})
        for name, tier in (("p1", "medium"), ("d1", "short"), ("d2", "medium"))
    ]
    second = request("x", Mode.PD_STAGED, stage=Stage.DECODE, prefill_instance="p1", prompt_tokens=20)
    assert {
        place(bucketed(*fleet), msgspec.structs.replace(second, decision_id=f"x{n}"))[0].instance
        for n in range(6)
    } == {"d2"}


@BOTH_MODES
def test_a_neutral_instance_helps_with_its_lengths_only(mode: Mode, stage: Stage) -> None:
    short = instance("n-short", labels={"tier": "short"})
    one = bucketed(*tiered("medium"), *tiered("short"), short, neutral=True)
    for tokens, helped in ((20, False), (10, True)):
        placed = [
            place(one, request(f"{tokens}.{n}", mode, stage=stage, prompt_tokens=tokens))[0] for n in range(4)
        ]
        assert any(p.instance == "n-short" for p in placed) is helped, tokens
