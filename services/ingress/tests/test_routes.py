"""Which route takes a request, and what an external endpoint is sent."""

from collections import Counter
from random import Random
from typing import Any

import pytest

from penstock.ingress.http_wire import RequestHead, parse_request
from penstock.ingress.route_config import document
from penstock.ingress.routes import Choice, External, Proxy, Routes, build, join_path

A, B, C = "http://a:8000", "http://b:8000", "http://c:8000"


def routes(policy: str, *entries: dict[str, Any]) -> Routes:
    built = build(document({"policy": policy, "routes": list(entries)}))
    assert built is not None
    return built


def head(*lines: str, path: str = "/v1/chat/completions") -> RequestHead:
    return parse_request("\r\n".join([f"POST {path} HTTP/1.1", "host: gateway", *lines, ""]).encode())


def names(choice: Choice) -> tuple[str, str]:
    return (choice.route.name if choice.route else ""), choice.reason


# -- weight --------------------------------------------------------------------------------------------


def test_an_even_split_of_ten_thousand_is_even_within_two_percent() -> None:
    split = routes("weight", {"base_url": "local", "weight": 50}, {"base_url": A, "weight": 50})
    draw = Random(7).random
    counts = Counter(names(split.choose(head(), "m", "", draw(), ""))[0] for _ in range(10_000))
    assert counts.keys() == {"local", "a:8000"}
    assert abs(counts["local"] - 5000) <= 200


@pytest.mark.parametrize(
    ("draw", "taken"), [(0.0, "local"), (0.249, "local"), (0.25, "a:8000"), (0.999999, "a:8000")]
)
def test_a_draw_falls_into_the_share_that_covers_it(draw: float, taken: str) -> None:
    split = routes(
        "weight",
        {"base_url": "local", "weight": 1},
        {"base_url": B, "weight": 0},
        {"base_url": A, "weight": 3},
    )
    assert names(split.choose(head(), "any model", "", draw, "")) == (taken, "weight")


def test_without_any_weight_no_route_takes_a_request() -> None:
    split = routes("weight", {"base_url": A, "fallback": True})
    assert names(split.choose(head(), "m", "", 0.5, "")) == ("", "none")
    assert [route.name for route in split.chain] == ["a:8000"]


def test_a_session_keeps_its_route_and_only_those_of_a_smaller_share_move() -> None:
    def of(weight: int) -> dict[str, str]:
        split = routes("weight", {"base_url": "local", "weight": weight}, {"base_url": A, "weight": 50})
        draw = Random(3).random
        return {s: names(split.choose(head(), "m", s, draw(), ""))[0] for s in map(str, range(4000))}

    even, again, less = of(50), of(50), of(25)
    assert even == again
    assert abs(sum(name == "local" for name in even.values()) - 2000) < 150
    assert abs(sum(name == "local" for name in less.values()) - 4000 / 3) < 150
    assert {even[s] for s in even if less[s] == "local"} == {"local"}


# -- prefix --------------------------------------------------------------------------------------------

PREFIXES = (
    {"prefix": "*", "base_url": "local"},
    {"prefix": "gpt-*", "base_url": A},
    {"prefix": "gpt-4", "base_url": B},
    {"prefix": "gpt-4*", "base_url": C},
    {"prefix": "gpt-4*", "base_url": "http://late:1"},
    {"prefix": "a*b", "base_url": "http://star:1"},
)


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        ("gpt-4", "b:8000"),
        ("gpt-4o", "c:8000"),
        ("gpt-3", "a:8000"),
        ("gpt-", "a:8000"),
        ("GPT-4", "local"),
        ("llama", "local"),
        ("a*b", "star:1"),
        ("axb", "local"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_exact_beats_the_longest_wildcard_which_beats_the_star(model: str, taken: str, order: int) -> None:
    entries = [entry for entry in PREFIXES if order == 1 or entry["base_url"] != "http://late:1"]
    assert names(routes("prefix", *entries[::order]).choose(head(), model, "", 0.0, "")) == (taken, "prefix")


def test_no_match_is_no_route() -> None:
    split = routes("prefix", {"prefix": "gpt-*", "base_url": "local"})
    assert names(split.choose(head(), "llama", "", 0.0, "")) == ("", "none")


# -- canaries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "line", "taken"),
    [
        ("x-canary", "X-Canary: anything", "canary"),
        ("X-Canary: yes", "x-canary:  yes ", "canary"),
        ("x-canary: yes", "x-canary: no", "local"),
        ("x-canary: yes", "x-other: yes", "local"),
        ("user: ann", "user: ann", "canary"),
    ],
)
def test_a_header_asks_for_the_canary(wanted: str, line: str, taken: str) -> None:
    split = routes(
        "weight",
        {"base_url": "local", "weight": 1},
        {"base_url": A, "name": "canary", "canary_header": wanted},
    )
    assert names(split.choose(head(line), "m", "", 0.0, ""))[0] == taken


def test_a_share_of_the_users_gets_the_canary_and_always_the_same_ones() -> None:
    split = routes(
        "weight",
        {"base_url": "local", "weight": 1},
        {"base_url": A, "name": "canary", "canary_percent": 10},
    )

    def taken(user: str) -> str:
        return names(split.choose(head(), "m", "", 0.0, user))[0]

    users = [f"user-{n}" for n in range(5000)]
    first = [taken(user) for user in users]
    assert abs(first.count("canary") - 500) < 75
    assert [taken(user) for user in users] == first
    assert names(split.choose(head(), "m", "", 0.0, ""))[0] == "local"


def test_a_canary_takes_models_of_its_prefix_only() -> None:
    split = routes(
        "prefix",
        {"base_url": "local", "prefix": "*"},
        {"base_url": A, "name": "canary", "prefix": "qwen*", "canary_header": "x-canary"},
    )
    assert names(split.choose(head("x-canary: 1"), "qwen3", "", 0.0, "")) == ("canary", "canary")
    assert names(split.choose(head("x-canary: 1"), "llama", "", 0.0, "")) == ("local", "prefix")
    assert names(split.choose(head(), "qwen3", "", 0.0, "")) == ("local", "prefix")


# -- what an endpoint is sent --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "target", "joined"),
    [
        ("", "/v1/chat/completions", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v3", "/v1/chat/completions?x=1&y", "/api/v3/chat/completions?x=1&y"),
        ("/compatible-mode", "/v1/chat/completions", "/compatible-mode/v1/chat/completions"),
        ("/compatible-mode/v1", "/v1/chat/completions", "/compatible-mode/v1/chat/completions"),
        ("/v", "/v1/x", "/v/v1/x"),
        ("/v2beta", "/v1/x", "/v2beta/v1/x"),
        ("/v1", "/version/x", "/v1/version/x"),
    ],
)
def test_a_base_that_ends_in_a_version_takes_the_place_of_the_paths_own(
    base: str, target: str, joined: str
) -> None:
    assert join_path(base.encode(), target.encode()) == joined.encode()


def external(proxy: Proxy | None = None, **fields: Any) -> External:
    entry = {"base_url": "https://ex.com/api/v3/", "weight": 1, **fields}
    built = build(document({"policy": "weight", "routes": [entry]}), lambda *_: proxy)
    assert built is not None
    assert built.entries[0].external is not None
    return built.entries[0].external


REQUEST = head(
    "authorization: Bearer client",
    "X-API-Key: client",
    "cookie: session=client",
    "connection: x-hop",
    "x-hop: 1",
    "x-kept: 2",
    "transfer-encoding: chunked",
    path="/v1/chat/completions?a=b",
)


@pytest.mark.parametrize(
    ("fields", "credentials"),
    [
        ({}, b""),
        ({"api_key": "secret"}, b"authorization: Bearer secret\r\n"),
        (
            {"forward_authorization": True},
            b"authorization: Bearer client\r\nX-API-Key: client\r\ncookie: session=client\r\n",
        ),
    ],
)
def test_an_endpoint_gets_its_own_key_and_never_the_clients_unless_it_is_told(
    fields: dict[str, Any], credentials: bytes
) -> None:
    sent = external(**fields).request_head(REQUEST, "id-1", 17)
    lines = sent.split(b"\r\n")
    assert lines[:2] == [b"POST /api/v3/chat/completions?a=b HTTP/1.1", b"host: ex.com"]
    assert set(lines[2:-2]) == {
        b"x-kept: 2",
        b"x-request-id: id-1",
        b"content-length: 17",
        *credentials.split(b"\r\n")[:-1],
    }


def test_through_a_proxy_a_plain_request_names_the_whole_url() -> None:
    sent = external(Proxy("p", 3128, "Basic xyz"), base_url="http://ex.com:8000/v1").request_head(
        REQUEST, "i", 0
    )
    assert sent.startswith(
        b"POST http://ex.com:8000/v1/chat/completions?a=b HTTP/1.1\r\nhost: ex.com:8000\r\n"
    )
    assert b"\r\nproxy-authorization: Basic xyz\r\n" in sent
    assert b"proxy-authorization" not in external(Proxy("p", 3128, "Basic xyz")).request_head(REQUEST, "i", 0)


def test_local_and_canaries_are_treated_apart_in_the_chain_and_names_are_told_apart() -> None:
    split = routes(
        "weight",
        {"base_url": "local", "weight": 1, "fallback": True},
        {"base_url": "local", "weight": 1, "model": "n", "rewrite_model": True},
        {"base_url": A, "fallback": True},
        {"base_url": A, "fallback": True, "model": "ignored"},
    )
    assert [route.name for route in split.entries] == ["local", "local#2", "a:8000", "a:8000#2"]
    assert [route.name for route in split.chain] == ["a:8000", "a:8000#2"]
    assert [route.rewrite for route in split.entries] == ["", "n", "", ""]


def test_an_empty_list_is_no_splitting() -> None:
    assert build(document({"policy": "weight", "routes": []})) is None
