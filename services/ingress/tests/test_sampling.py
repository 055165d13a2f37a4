"""Which requests are copied, and what of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.mirroring import MirrorConfig
from penstock.ingress.sampling import Sampler, target_without_credentials, without_credentials


def config(ratio: float = 100, **fields: Any) -> MirrorConfig:
    return MirrorConfig(Enable=True, Target="http://a", Ratio=ratio, **fields)


@given(st.floats(0, 100), st.integers(0, 1000))
def test_the_ratio_is_exact_to_within_one_at_any_time(ratio: float, count: int) -> None:
    sampler, taken = Sampler(), 0
    for number in range(1, count + 1):
        taken += sampler.takes(config(ratio), "m", b"")
        assert abs(taken - number * ratio / 100) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("ratio", "taken"), [(0, 0), (0.1, 10), (10, 1000), (50, 5000), (99.99, 9999), (100, 10_000)]
)
def test_of_ten_thousand_requests_it_is_exact(ratio: float, taken: int) -> None:
    sampler = Sampler()
    assert sum(sampler.takes(config(ratio), "m", b"") for _ in range(10_000)) == taken


def test_a_changed_ratio_counts_at_once() -> None:
    sampler = Sampler()
    assert sum(sampler.takes(config(10), "m", b"") for _ in range(100)) == 10
    assert sum(sampler.takes(config(100), "m", b"") for _ in range(100)) == 100
    assert sum(sampler.takes(config(0), "m", b"") for _ in range(100)) == 0


def test_only_requests_that_match_count() -> None:
    sampler, chosen = Sampler(), config(50, Models=["a", "b"])
    taken = [model for _ in range(100) for model in "abc" if sampler.takes(chosen, model, b"")]
    assert (len(taken), "c" in taken) == (100, False)


@pytest.mark.parametrize(
    ("wanted", "block", "taken"),
    [
        ({"x-tier": "beta"}, b"X-Tier:  beta\t\r\n", True),
        ({"X-Tier": "beta"}, b"x-tier: beta\r\n", True),
        ({"x-tier": "beta"}, b"x-tier: alpha\r\nx-tier: beta\r\n", True),
        ({"x-tier": "beta"}, b"x-tier: Beta\r\n", False),
        ({"x-tier": "beta"}, b"", False),
        ({"x-tier": ""}, b"x-tier: any\r\n", True),
        ({"x-tier": ""}, b"y-tier: any\r\n", False),
        ({"a": "1", "b": "2"}, b"a: 1\r\nb: 2\r\n", True),
        ({"a": "1", "b": "2"}, b"a: 1\r\n", False),
        ({"a": "\xe9"}, b"a: \xe9\r\n", True),
    ],
)
def test_headers_choose(wanted: dict[str, str], block: bytes, taken: bool) -> None:
    chosen = MirrorConfig.model_validate(
        {"Enable": True, "Target": "http://a", "Ratio": 100, "Headers": wanted}
    )
    assert Sampler().takes(chosen, "m", block) is taken


def test_headers_that_end_at_the_gateway_choose_as_well() -> None:
    chosen = MirrorConfig.model_validate(
        {"Enable": True, "Target": "http://a", "Ratio": 100, "Headers": {"x-owned-by": "vllm", "a": "1"}}
    )
    assert Sampler().takes(chosen, "m", b"a: 1\r\n", {b"x-owned-by": b"vllm"})
    assert not Sampler().takes(chosen, "m", b"a: 1\r\n", {b"x-owned-by": b"other"})


@pytest.mark.parametrize("block", [b"x-penstock-mirror: 1\r\n", b"a: b\r\nX-Penstock-Mirror:1\r\n"])
def test_a_copy_is_not_copied_again(block: bytes) -> None:
    assert not Sampler().takes(config(), "m", block)
    assert Sampler().takes(config(), "m", b"a: x-penstock-mirror: 1\r\n")


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        (b"", b""),
        (b"Authorization: Bearer a\r\n", b""),
        (b"a: b\r\nCookie: c\r\nX-API-Key: d\r\nApi-Key:e\r\nf: g\r\n", b"a: b\r\nf: g\r\n"),
        (b"x-authorization-hint: a\r\n", b"x-authorization-hint: a\r\n"),
    ],
)
def test_credentials_are_left_out(block: bytes, kept: bytes) -> None:
    assert without_credentials(block) == kept


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (b"/v1/x", b"/v1/x"),
        (b"/v1/x?", b"/v1/x?"),
        (b"/v1/x?a=1&b", b"/v1/x?a=1&b"),
        (b"/v1/x?api_key=s", b"/v1/x"),
        (b"/v1/x?API-KEY=s&a=1", b"/v1/x?a=1"),
        (b"/v1/x?a=1&key=s&b=2", b"/v1/x?a=1&b=2"),
        (b"/v1/x?a=1&access_token=s", b"/v1/x?a=1"),
        (b"/v1/x?key=1&key=2&token=3", b"/v1/x"),
        (b"/v1/x?monkey=1", b"/v1/x?monkey=1"),
    ],
)
def test_keys_in_the_query_are_left_out(target: bytes, kept: bytes) -> None:
    assert target_without_credentials(target) == kept
