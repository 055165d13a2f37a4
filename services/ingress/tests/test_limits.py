"""Windows, claims and corrections; who may ask how much; settings."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from penstock.common.profiles import read_document
from penstock.ingress.limit_settings import Limits, LimitSettings, UserRecord
from penstock.ingress.limits import (
    MINUTE_S,
    REQUESTS,
    TOKENS,
    Correction,
    LocalCounts,
    Part,
    left_s,
    rate_headers,
    refusal,
    window,
)
from penstock.ingress.plans import Allowances, Plan
from penstock.ingress.rates import Rates

NOW = 1_700_000_040.0


def part(key: str = "k", amount: int = 1, limit: int = 10, what: str = REQUESTS) -> Part:
    return Part(key, MINUTE_S, amount, limit, what, "user")


class Kept:
    """Fulfils `Counts`."""

    def __init__(self) -> None:
        self.corrections: list[Correction] = []

    def correct(self, corrections: Iterable[Correction]) -> None:
        self.corrections += corrections


@given(now=st.floats(0, 2**33), window_s=st.integers(1, 3600))
def test_a_moment_lies_in_its_window_and_the_next_begins_when_this_one_is_over(
    now: float, window_s: int
) -> None:
    number, left = window(now, window_s), left_s(now, window_s)
    assert number * window_s <= now < (number + 1) * window_s
    assert 1 <= left <= window_s
    assert (number + 1) * window_s <= now + left


Claims = st.lists(st.tuples(st.floats(0, 200), st.integers(1, 12), st.integers(1, 12)), max_size=60)


@settings(max_examples=200)
@given(claims=Claims, limits=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_no_window_grants_more_than_its_limits_and_none_refuses_what_fits(
    claims: list[tuple[float, int, int]], limits: tuple[int, int]
) -> None:
    counts = LocalCounts()
    granted: dict[int, list[int]] = {}
    for now, first, second in sorted(claims):
        key = window(now, MINUTE_S)
        used = granted.setdefault(key, [0, 0])
        verdict = counts.claim([part("a", first, limits[0]), part("b", second, limits[1])], now)
        fits = used[0] + first <= limits[0] and used[1] + second <= limits[1]
        assert (verdict.over < 0) is fits
        if fits:
            used[0], used[1] = used[0] + first, used[1] + second
        assert verdict.used == tuple(used)


def test_a_refused_claim_takes_nothing_and_names_the_first_limit() -> None:
    counts = LocalCounts()
    parts = [part("r"), part("t", 100, 50, TOKENS)]
    for _ in range(3):
        verdict = counts.claim(parts, NOW)
        assert (verdict.over, verdict.used) == (1, (0, 0))


def test_a_correction_gives_back_within_its_window_and_charges_in_a_later_one() -> None:
    counts = LocalCounts()
    tokens = part("t", 10, 100, TOKENS)
    counts.claim([tokens], NOW)
    number = window(NOW, MINUTE_S)
    counts.correct([Correction("t", MINUTE_S, number, -4)], NOW)
    assert counts.claim([tokens], NOW).used == (16,)
    later = NOW + MINUTE_S
    counts.correct([Correction("t", MINUTE_S, number, -4), Correction("t", MINUTE_S, number, 30)], later)
    assert counts.claim([tokens], later).used == (40,)
    counts.correct([Correction("t", MINUTE_S, number + 1, -1000)], later)
    assert counts.claim([tokens], later).used == (10,)


def test_made_up_names_share_one_allowance_beyond_the_bound() -> None:
    counts = LocalCounts(most_keys=3)
    assert all(counts.claim([part(f"u{n}", limit=2)], NOW).over < 0 for n in range(3))
    made_up = [counts.claim([part(f"x{n}", limit=2)], NOW).over for n in range(4)]
    assert made_up == [-1, -1, 0, 0]
    assert counts.claim([part("u0", limit=2)], NOW).over < 0
    assert counts.claim([part("x9", limit=2)], NOW + MINUTE_S).over < 0


def test_settling_corrects_tokens_once_and_leaves_requests() -> None:
    kept = Kept()
    parts = [part("r"), part("t", 100, 500, TOKENS)]
    reservation = Plan(parts).held(parts, LocalCounts().claim(parts, NOW), kept)
    reservation.settle(130)
    reservation.settle(0)
    assert kept.corrections == [Correction("t", MINUTE_S, window(NOW, MINUTE_S), 30)]


def test_records_stand_before_defaults_and_zero_lifts_them() -> None:
    allowances = Allowances(Limits(rpm=5, tpm=1000))

    def of(user: str, model: str = "m") -> list[tuple[str, int]]:
        return [(p.what, p.limit) for p in allowances.parts(user, model, 10)]

    assert of("nobody") == [(REQUESTS, 5), (TOKENS, 1000)]
    allowances.put("a", UserRecord(rpm=0))
    assert of("a") == [(TOKENS, 1000)]
    allowances.put("a", UserRecord(rpm=0, tpm=7, models={"m": Limits(rpm=3)}))
    assert of("a") == [(TOKENS, 7), (REQUESTS, 3)]
    assert of("a", "other") == [(TOKENS, 7)]
    allowances.put("a", None)
    assert of("a") == of("nobody")


def test_names_made_to_look_like_others_have_counts_of_their_own() -> None:
    allowances = Allowances(Limits(rpm=5))
    names = ["a", "a:m", "1:a", "a|r", "a:m|r", "\u00e4", "*"]
    for name in names:
        allowances.put(name, UserRecord(rpm=5, models={"m": Limits(rpm=1), "m|r": Limits(rpm=1)}))
    keys = [p.key for name in names for p in allowances.parts(name, "m", 1)]
    assert len(keys) == len(set(keys)) == 2 * len(names)


def test_a_request_larger_than_the_limit_takes_all_of_it() -> None:
    (tokens,) = Allowances(Limits(tpm=50)).parts("a", "m", 2**40)
    assert tokens.amount == 50
    (tokens,) = Allowances(Limits(tpm=50)).parts("a", "m", 0)
    assert tokens.amount == 1


def test_headers_tell_the_tightest_limit_of_each_kind() -> None:
    parts = [part("r", limit=10), part("t", 60, 100, TOKENS), part("r2", limit=3)]
    lines = rate_headers(parts, LocalCounts().claim(parts, NOW - 60)).decode().splitlines()
    assert lines == [
        "x-ratelimit-limit-requests: 3",
        "x-ratelimit-remaining-requests: 2",
        "x-ratelimit-reset-requests: 1m0s",
        "x-ratelimit-limit-tokens: 100",
        "x-ratelimit-remaining-tokens: 40",
        "x-ratelimit-reset-tokens: 1m0s",
    ]
    # What has no two of a kind is told by another way, and the same.
    for some in (parts[:1], parts[1:2], parts[:2]):
        for now in (NOW, NOW + 0.3, NOW + 59.9):
            verdict = LocalCounts().claim(some, now)
            assert Plan(some).held(some, verdict, Kept()).headers == rate_headers(some, verdict)
    verdict = LocalCounts().claim([part("t", 60, 50, TOKENS)], NOW + 59.2)
    error = refusal([part("t", 60, 50, TOKENS)], verdict)
    assert (error.status, error.retry_after_s) == (429, 1)
    assert error.lines.startswith("x-error-tpm-exceeded: true\r\n")
    assert "x-ratelimit-reset-tokens: 1s" in error.lines


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"limits_store": "redis"}, "--limits-redis-url"),
        ({"limits_redis_url": "redis://h:1"}, "--limits-store redis"),
        ({"limits_store": "redis", "limits_redis_url": "http://h:1"}, "one server"),
        ({"limits_store": "redis", "limits_redis_url": "redis://h:x"}, "not an address"),
        ({"limits_store": "redis", "limits_redis_url": "redis://u:secret@h"}, "--limits-redis-password"),
        ({"limits_store": "redis", "limits_redis_url": "redis://h/a"}, "one server"),
        ({"limits_default_rpm": -1}, "limits_default_rpm"),
    ],
)
def test_settings_that_cannot_be_meant(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named) as fault:
        LimitSettings.model_validate(fields)
    assert "secret" not in str(fault.value.errors()[0]["msg"])


def test_profiles_say_what_a_model_gets_per_second() -> None:
    rates = Rates()
    assert rates.part("m", "", 1, 1) is None
    chat = {"profiles": {"a": {"requests_per_second": 5, "auto": {"prompt_tokens_gte": 100}}, "b": {}}}
    general = {"profiles": {"default": {"requests_per_second": 7}}}
    rates.configure({"m": read_document(chat | {"default": "a"}), "*": read_document(general)})
    assert rates.active

    def of(model: str, asked: str, prompt_tokens: int = 10) -> tuple[str, int, int] | None:
        part = rates.part(model, asked, prompt_tokens, 0)
        return (part.key, part.limit, part.window_s) if part is not None else None

    assert of("m", "") == of("m", "a") == of("m", "auto", 100) == ("m1:m:a|s", 5, 1)
    assert of("m", "b") is of("m", "unknown") is None
    assert of("other", "default") == ("m5:other:default|s", 7, 1)
    rates.configure({"m": read_document({"profiles": {"default": {"requests_per_second": 0}}})})
    assert (rates.active, of("m", "")) == (False, None)
