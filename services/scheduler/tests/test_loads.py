"""The numbers that policies compare: what passes with time, what ages, what is learned of speeds."""

from __future__ import annotations

import pytest

from penstock.common.messages import InstanceSpeed
from penstock.common.model import Endpoint, EngineLoad, Instance
from penstock.scheduler.bench import table_of
from penstock.scheduler.loads import (
    DEFAULT_KV_TOKENS,
    DEFAULT_MS_PER_TOKEN,
    DEFAULT_TPOT_MS,
    KV_FULL_MS,
    SPEED_HALF_LIFE_S,
    STATUS_MAX_AGE_S,
)
from penstock.scheduler.speeds import FIRST_TOKENS, MAX_HEARD, Speeds
from penstock.scheduler.view import ClusterView


def view_of(*names: str, **weights: float) -> ClusterView:
    view = ClusterView()
    endpoint = Endpoint("h", 1)
    instances = [
        Instance(id=name, endpoint=endpoint, models=("m",), weight=weights.get(name, 1.0)) for name in names
    ]
    view.refresh(table_of(instances), lambda slots: None)
    assert view.pool("m") is not None
    view.advance(0.0)
    return view


def number(view: ClusterView, name: str, instance: str = "a") -> float:
    slot = view.slot(instance)
    assert slot is not None
    return float(getattr(view.loads, name)[slot])


def test_prefill_ahead_is_worked_off_with_time_and_never_more_than_is_pending() -> None:
    view = view_of("a")
    view.take([("a", 1, 8000, 8000)])
    assert number(view, "backlog_ms") == 1000
    view.advance(0.6)
    assert number(view, "backlog_ms") == pytest.approx(400)
    view.take([("a", 2, 16000, 16000)])
    assert number(view, "backlog_ms") == pytest.approx(1400)
    # The first answers of both began earlier than expected.
    view.take([("a", 2, 16000, 0)])
    assert number(view, "backlog_ms") == 0
    assert number(view, "wait_ms") == pytest.approx(2 * 0.5 * DEFAULT_TPOT_MS)


def test_an_answer_that_never_shows_a_first_token_does_not_keep_its_instance_waiting() -> None:
    view = view_of("a")
    view.take([("a", 1, 8000, 8000)])
    view.advance(30.0)
    assert number(view, "pending") == 8000
    assert number(view, "backlog_ms") == 0


def test_an_engines_kv_use_is_believed_for_its_time_then_tokens_in_flight_stand_in() -> None:
    view = view_of("a", "b")
    view.take([("a", 1, 500, 0)])
    assert view.take_status("a", EngineLoad(1, 0, 0.75, 100, 10), 1.0)
    for now, used in ((1.5, 0.75), (1.0 + STATUS_MAX_AGE_S, 0.75), (1.1 + STATUS_MAX_AGE_S, 0.5)):
        view.advance(now)
        assert number(view, "kv_used") == pytest.approx(used)
    # b never said how large it is: as large as the others.
    view.take([("b", 1, 250, 0)])
    view.advance(20.0)
    assert number(view, "kv_used", "b") == pytest.approx(0.25)


def test_a_status_without_kv_use_does_not_make_the_old_figure_young() -> None:
    view = view_of("a")
    view.take_status("a", EngineLoad(1, 0, 0.75, 100, 10), 1.0)
    view.take_status("a", EngineLoad(running=2), 2.0 + STATUS_MAX_AGE_S)
    view.advance(2.0 + STATUS_MAX_AGE_S)
    assert number(view, "kv_used") == 0


def test_without_any_size_the_default_is_taken_and_nothing_is_held_against_an_instance() -> None:
    view = view_of("a")
    view.take([("a", 1, int(DEFAULT_KV_TOKENS), 0)])
    view.advance(1.0)
    assert (number(view, "kv_used"), number(view, "kv_wait_ms")) == (1, 0)


@pytest.mark.parametrize(("used", "wait_ms"), [(0.5, 0), (0.9, 0), (0.95, KV_FULL_MS / 2), (1.0, KV_FULL_MS)])
def test_a_nearly_full_kv_cache_is_waited_for(used: float, wait_ms: float) -> None:
    view = view_of("a")
    view.take_status("a", EngineLoad(kv_usage_ratio=used, kv_blocks=100, block_size=10), 1.0)
    view.advance(1.0)
    assert number(view, "kv_wait_ms") == pytest.approx(wait_ms, abs=1e-6)


def test_weights_count_relative_to_each_other_and_scale_what_is_not_learned() -> None:
    view = view_of("a", "b", a=30, b=10)
    assert (number(view, "weight"), number(view, "weight", "b")) == (1.5, 0.5)
    assert number(view, "ms_per_token") == pytest.approx(DEFAULT_MS_PER_TOKEN / 1.5)
    assert number(view, "tpot_ms", "b") == pytest.approx(DEFAULT_TPOT_MS / 0.5)
    view = view_of("a", "b", a=1e308, b=1e-308)
    assert 0 < number(view, "weight", "b") < number(view, "weight") < 1000


def speeds(view: ClusterView) -> Speeds:
    return Speeds(view.loads, view.slot)


def told(
    instance: str, tokens: int, ms_per_token: float, tpot_ms: float = 0, decoded: int = 0
) -> InstanceSpeed:
    return InstanceSpeed(
        instance,
        1,
        tokens,
        decoded,
        1,
        0,
        round(tokens * ms_per_token),
        tokens,
        round(decoded * tpot_ms),
        decoded,
    )


def test_speeds_are_learned_and_a_new_instance_is_taken_for_a_usual_one() -> None:
    view = view_of("a", "b", "c")
    heard = speeds(view)
    heard.take("i", "1", (told("a", 100_000, 0.1, 10, 50_000), told("b", 100_000, 0.4, 40, 50_000)))
    view.advance(1.0)
    assert number(view, "ms_per_token", "a") == pytest.approx(0.1, rel=0.2)
    assert number(view, "ms_per_token", "b") == pytest.approx(0.4, rel=0.1)
    assert number(view, "ms_per_token", "c") == pytest.approx(0.25, rel=0.01)
    assert number(view, "tpot_ms", "c") == pytest.approx(25, rel=0.01)
    assert number(view, "tpot_ms", "a") == pytest.approx(10, rel=0.1)


def test_repeats_losses_and_restarts_of_an_ingress_are_counted_once() -> None:
    view = view_of("a")
    heard = speeds(view)
    heard.take("i", "1", (told("a", 1000, 0.2),))
    for tokens in (2000, 2000, 5000):
        heard.take("i", "1", (told("a", tokens, 0.2),))
    assert number(view, "prefill_tokens") == 5000
    heard.take("i", "2", (told("a", 700, 0.2),))
    assert number(view, "prefill_tokens") == 5700
    # Sums that fell within an incarnation: a new base, nothing to add.
    heard.take("i", "2", (told("a", 100, 0.2),))
    heard.take("i", "2", (told("a", 300, 0.2),))
    assert number(view, "prefill_tokens") == 5900
    assert number(view, "prefill_ms") == pytest.approx(5900 * 0.2)


def test_a_long_past_counts_for_its_ratio_not_for_its_length() -> None:
    view = view_of("a")
    speeds(view).take("i", "1", (told("a", 10**9, 0.2),))
    assert number(view, "prefill_tokens") == FIRST_TOKENS
    assert number(view, "prefill_ms") == pytest.approx(FIRST_TOKENS * 0.2)
    assert number(view, "served") == 0


def test_what_was_served_is_remembered_for_about_its_half_life() -> None:
    view = view_of("a")
    view.advance(1.0)
    heard = speeds(view)
    heard.take("i", "1", (InstanceSpeed("a"),))
    heard.take("i", "1", (InstanceSpeed("a", 1, 1000, 500),))
    assert number(view, "served") == 2500
    view.advance(1.0 + SPEED_HALF_LIFE_S)
    assert number(view, "served") == pytest.approx(1250)


@pytest.mark.parametrize(
    "absurd",
    [
        InstanceSpeed("a", 2**40, 2**40, 2**40, 2**40, 2**40, 2**40, 1, 2**40, 1),
        InstanceSpeed("a", 1, 1, 1, 1, 0, 0, 2**40, 0, 2**40),
    ],
)
def test_absurd_speeds_stay_within_bounds(absurd: InstanceSpeed) -> None:
    view = view_of("a", "b")
    heard = speeds(view)
    heard.take("i", "1", (absurd,))
    view.advance(1.0)
    for name in ("a", "b"):
        assert 0.001 <= number(view, "ms_per_token", name) <= 100
        assert 0.1 <= number(view, "tpot_ms", name) <= 10_000


def test_what_ingresses_say_of_strangers_or_before_they_left_is_not_kept() -> None:
    view = view_of("a", "b")
    heard = speeds(view)
    heard.take("i", "1", (told("nobody", 10, 1), told("a", 10, 1), told("b", 10, 1)))
    assert heard._count == 2
    heard.forget(instances=("b",))
    assert heard._count == 1
    heard.forget(ingresses=("i",))
    assert (heard._count, heard._heard) == (0, {})
    assert MAX_HEARD > 0


def test_prompts_that_nobody_fetched_are_the_engines_last_word() -> None:
    view = view_of("a", "b")
    view.take_status("a", EngineLoad(1, kv_expired=2), 1.0)
    view.take_status("a", EngineLoad(1), 2.0)
    view.take_status("gone", EngineLoad(1, kv_expired=9), 2.0)
    assert view.kv_expired() == [("a", 2.0)]
