"""Requests of limited users: what they get, what reaches the engine, and what is counted in the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from integration.servers import eventually, free_port

from penstock.common.config_keeping import ConfigWriter, follow_config
from penstock.common.live_config import USER, LiveConfig
from penstock.common.profiles import read_document
from penstock.common.subjects import CONFIG
from penstock.ingress.adapters.limit_store import RedisLimitStore
from penstock.ingress.limit_settings import UserRecord
from penstock.ingress.limiter import Limiter
from penstock.ingress.limits import Verdict

from .conftest import LabOf
from .ingress_lab import BODY, MODEL, STREAM_BODY, Engine, Lab, Peer, Response

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
WHOLE = json.dumps({"choices": [{}], "usage": USAGE}).encode()
TOKEN = '{"choices":[{"delta":{"content":"x"}}]}'
LAST = json.dumps({"choices": [], "usage": USAGE})
# The first moment of a window.
NOW = 1_700_000_040.0


class Clock:
    """Stands until it is told to go on."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@contextmanager
def limited(lab: Lab, **record: Any) -> Iterator[tuple[Limiter, Clock]]:
    """User `u` is limited in the lab's ingress."""
    clock = Clock()
    limiter = Limiter(lab.settings, lab.metrics, lab.gateway.degraded, clock)
    limiter.allowances.put("u", UserRecord.model_validate(record))
    lab.gateway.limits = limiter.if_active
    yield limiter, clock


def used_tokens(limiter: Limiter, user: str = "u") -> int:
    """What is counted, by asking for nothing more than can be refused."""
    (part,) = (p for p in limiter.allowances.parts(user, MODEL, 1) if p.what == "tokens")
    verdict: Verdict = limiter.local.claim([part._replace(amount=part.limit + 1)])
    return verdict.used[0]


async def answered(client: Peer, engine: Engine, body: bytes = BODY, **headers: str) -> Response:
    """One request that the engine answers with usage, on a connection of its own."""
    client.post(body, **headers)
    peer = await engine.accept()
    await peer.request()
    peer.answer(WHOLE, "200 OK", "connection: close")
    peer.close()
    return await client.response()


async def test_the_third_of_two_a_minute_gets_a_429_and_the_next_minute_is_another(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, rpm=2) as (_, clock):
        for left in ("1", "0"):
            response = await answered(client, engine, user="u")
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
        refused = await client.ask(user="u")
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["x-error-rpm-exceeded"] == "true"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        clock.now += int(refused.headers["retry-after"])
        assert (await answered(client, engine, user="u")).status == 200
        for other in ("", "somebody else"):
            response = await answered(client, engine, user=other)
            assert "x-ratelimit-limit-requests" not in response.headers
    assert lab.metric("penstock_ingress_limits_total", "requests") == 1
    assert lab.metric("penstock_ingress_limits_total", "granted") == 3


async def test_tokens_are_held_by_estimate_and_settled_by_usage(lab: Lab) -> None:
    engine, client, other = await lab.engine(), await lab.client(), await lab.client()
    body = BODY[:-1] + b',"max_tokens":90}'
    with limited(lab, tpm=100) as (limiter, _):
        client.post(body, user="u")
        peer = await engine.accept()
        await peer.request()
        assert used_tokens(limiter) > 90
        refused = await other.ask(body, user="u")
        assert (refused.status, refused.headers["x-error-tpm-exceeded"]) == (429, "true")
        peer.answer(WHOLE, "200 OK", "connection: close")
        peer.close()
        assert int((await client.response()).headers["x-ratelimit-remaining-tokens"]) < 10
        await eventually(lambda: used_tokens(limiter) == 12)


@pytest.mark.parametrize("asks", [True, False])
async def test_the_usage_of_a_stream_is_asked_for_and_hidden_from_who_did_not_ask(
    lab: Lab, asks: bool
) -> None:
    engine, client = await lab.engine(), await lab.client()
    body = STREAM_BODY
    if asks:
        body = body[:-1] + b',"stream_options":{"include_usage":true}}'
    with limited(lab, tpm=1000) as (limiter, _):
        client.post(body, user="u")
        peer = await engine.accept()
        _, _, sent = await peer.request()
        assert json.loads(sent)["stream_options"] == {"include_usage": True}
        assert (sent == body) is asks
        peer.begin_stream()
        for event in (TOKEN, TOKEN, LAST, "[DONE]"):
            peer.event(event)
        peer.send(b"0\r\n\r\n")
        response = await client.response()
        assert (LAST.encode() in response.body) is asks
        assert response.body.count(b"data:") == (4 if asks else 3)
        assert response.body.endswith(b"data: [DONE]\n\n")
        await eventually(lambda: used_tokens(limiter) == 12)
        # The connection is as good as before.
        lab.gateway.limits = None
        client.post()
        await peer.request()
        peer.answer()
        assert (await client.response()).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_engine_tells_of_limits_of_its_own_gives_way_to_ours(lab: Lab, stream: bool) -> None:
    engine, client = await lab.engine(), await lab.client()
    its = ("X-RateLimit-Limit-Tokens: 99", "x-ratelimit-remaining-other: 98", "x-kept: 1")
    with limited(lab, tpm=1000):
        for user, limit in (("u", "1000"), ("somebody else", "99")):
            client.post(STREAM_BODY if stream else BODY, user=user)
            peer = await engine.accept()
            await peer.request()
            if stream:
                peer.begin_stream("connection: close", *its)
                peer.event("[DONE]")
                peer.send(b"0\r\n\r\n")
            else:
                peer.answer(WHOLE, "200 OK", "connection: close", *its)
            peer.close()
            response = await client.response()
            assert response.headers["x-ratelimit-limit-tokens"] == limit
            assert ("x-ratelimit-remaining-other" in response.headers) is (user != "u")
            assert response.headers["x-kept"] == "1"


async def test_an_error_that_was_kept_tells_of_our_limits_too(lab_of: LabOf) -> None:
    lab = await lab_of(retry_max_count=1)
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, rpm=5):
        client.post(user="u")
        peer = await engine.accept()
        await peer.request()
        peer.answer(b"{}", "500 Oh", "connection: close", "x-ratelimit-limit-requests: 99")
        peer.close()
        response = await client.response()
    assert (response.status, response.headers["x-ratelimit-limit-requests"]) == (500, "5")
    assert response.wire.count(b"x-ratelimit-limit-requests") == 1


async def test_without_a_limit_of_tokens_a_stream_stays_byte_for_byte(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, rpm=5):
        client.post(STREAM_BODY, user="u")
        peer = await engine.accept()
        assert (await peer.request())[2] == STREAM_BODY
        peer.begin_stream()
        wire = peer.event(TOKEN) + peer.event(LAST) + b"0\r\n\r\n"
        peer.send(b"0\r\n\r\n")
        assert (await client.response()).wire.endswith(wire)


async def test_a_client_of_http_1_0_gets_the_stream_without_chunks_and_without_usage(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, tpm=1000) as (limiter, _):
        head = b"POST /v1/chat/completions HTTP/1.0\r\nuser: u\r\ncontent-length: %d\r\n\r\n"
        client.send(head % len(STREAM_BODY) + STREAM_BODY)
        peer = await engine.accept()
        await peer.request()
        peer.begin_stream()
        for event in (TOKEN, LAST, "[DONE]"):
            peer.event(event)
        peer.send(b"0\r\n\r\n")
        received = await client.rest()
        assert received.endswith(f"\r\n\r\ndata: {TOKEN}\n\ndata: [DONE]\n\n".encode())
        await eventually(lambda: used_tokens(limiter) == 12)


async def test_an_aborted_stream_costs_its_prompt_and_what_was_sent(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, tpm=1000) as (limiter, _):
        client.post(STREAM_BODY, user="u")
        peer = await engine.accept()
        await peer.request()
        peer.begin_stream()
        # Three events in one piece.
        text = f"data: {TOKEN}\n\n".encode() * 3
        peer.send(b"%x\r\n%b\r\n" % (len(text), text))
        await client.until(b'"x"')
        prompt = next(iter(lab.gateway.exchanges)).request.prompt_tokens
        client.reset()
        await lab.settled()
        assert used_tokens(limiter) == prompt + 3


async def test_an_answer_whose_client_left_costs_its_estimate(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, tpm=1000) as (limiter, _):
        client.post(BODY[:-1] + b',"max_tokens":90}', user="u")
        peer = await engine.accept()
        await peer.request()
        held = used_tokens(limiter)
        client.reset()
        await lab.settled()
        assert used_tokens(limiter) == held > 90


async def test_a_retried_request_is_counted_once_and_a_failed_one_costs_no_tokens(lab: Lab) -> None:
    first, client = await lab.engine("e1"), await lab.client()
    with limited(lab, rpm=10, tpm=1000) as (limiter, _):
        client.post(user="u")
        peer = await first.accept()
        await peer.request()
        peer.answer(b"{}", "500 Internal Server Error", "connection: close")
        peer.close()
        assert (await client.response()).status == 500
        await eventually(lambda: used_tokens(limiter) == 0)
        first.refuse()
        second = await lab.engine("e2")
        response = await answered(client, second, user="u")
        assert (response.status, response.headers["x-ratelimit-remaining-requests"]) == (200, "8")
        await eventually(lambda: used_tokens(limiter) == 12)


async def test_fifty_at_once_against_ten(lab: Lab) -> None:
    clients = [await lab.client() for _ in range(50)]
    with limited(lab, rpm=10):
        for client in clients:
            client.post(user="u")
        answers = [await client.response() for client in clients]
    # There is no instance for those who pass.
    statuses = sorted(answer.status for answer in answers)
    assert statuses == [404] * 10 + [429] * 40


PROFILES = {"m": {"default": "slow", "profiles": {"slow": {"requests_per_second": 2}, "fast": {}}}}


async def test_a_model_gets_what_its_config_profile_says_per_second(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab) as (limiter, clock):
        limiter.allowances.put("u", None)
        assert limiter.if_active is None
        limiter.rates.configure({name: read_document(value) for name, value in PROFILES.items()})
        lab.gateway.limits = limiter.if_active
        for left in ("1", "0"):
            response = await answered(client, engine, user="u")
            assert (response.status, response.headers["x-ratelimit-remaining-requests"]) == (200, left)
        refused = await client.ask(config_profile="slow")
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.error["message"] == (
            "the model in profile 'slow' is over its limit of 2 requests per second, 2 are counted"
        )
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-error-model-rps-exceeded"] == "true"
        assert refused.headers["x-ratelimit-reset-requests"] == "1s"
        assert (await answered(client, engine, config_profile="fast")).status == 200
        clock.now += 1
        assert (await answered(client, engine)).status == 200


async def test_a_refusal_for_the_model_costs_its_user_nothing(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, rpm=5, tpm=1000) as (limiter, _):
        limiter.rates.configure({"*": read_document({"profiles": {"default": {"requests_per_second": 1}}})})
        assert (await answered(client, engine, user="u")).status == 200
        for _ in range(3):
            refused = await client.ask(user="u")
            assert (refused.status, refused.headers["x-error-model-rps-exceeded"]) == (429, "true")
        lab.gateway.limits, limiter.rates.active = limiter, False
        assert (await answered(client, engine, user="u")).headers["x-ratelimit-remaining-requests"] == "3"


@pytest.mark.parametrize(
    ("user", "status"),
    [
        ("u" * 513, 400),
        ("x" * 512, 200),
        ("\xff\xfe", 200),
        ("a:b|r", 200),
        ("*", 200),
        ("penstock:limits:%s'\"; DROP", 200),
        ("  ", 200),
    ],
)
async def test_names_of_any_kind(lab: Lab, user: str, status: int) -> None:
    engine, client = await lab.engine(), await lab.client()
    with limited(lab, rpm=1):
        if status == 200:
            assert (await answered(client, engine, user=user)).status == 200
        else:
            assert (await client.ask(user=user)).status == status


@asynccontextmanager
async def configured(lab: Lab) -> AsyncIterator[ConfigWriter]:
    """The lab's ingress follows the live configuration, and somebody writes it."""
    limiter = Limiter(lab.settings, lab.metrics, lab.gateway.degraded, time.time)
    live, kept = LiveConfig(), LiveConfig(keeps=True)

    def apply(changed: list[tuple[str, str]]) -> None:
        limiter.follow(live, changed)
        lab.gateway.limits = limiter.if_active

    tasks = [
        asyncio.create_task(follow_config(lab.bus, live, apply)),
        asyncio.create_task(follow_config(lab.bus, kept)),
    ]
    try:
        await eventually(lambda: kept.synced and live.synced)
        yield ConfigWriter(lab.bus, kept)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_records_are_live_and_bad_ones_change_nothing(lab: Lab) -> None:
    await lab.bus.ensure_bucket(CONFIG)
    client = await lab.client()
    async with configured(lab) as writer:
        assert lab.gateway.limits is None
        await writer.put(USER, "u", {"rpm": 1}, "test", "test")
        await eventually(lambda: lab.gateway.limits is not None)
        assert [(await client.ask(user="u")).status for _ in range(2)] == [404, 429]
        await writer.put(USER, "u", {"rpm": -1}, "test", "test")
        await writer.put(USER, "bad", {"rmp": 1}, "test", "test")
        await writer.put(USER, "v", {"rpm": 0, "models": {MODEL: {"rpm": 1}}}, "test", "test")
        assert (await client.ask(user="u")).status == 429
        assert [(await client.ask(user="v")).status for _ in range(2)] == [404, 429]
        for name in ("u", "v", "bad"):
            await writer.delete(USER, name, "test", "test")
        await eventually(lambda: lab.gateway.limits is None)


@pytest.mark.parametrize(
    ("mode", "statuses"), [("local", [404, 429]), ("open", [404, 404]), ("closed", [503, 503])]
)
async def test_while_the_store_is_away(mode: str, statuses: list[int]) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    lab = await Lab(limits_store="redis", limits_redis_url=url, limits_on_store_loss=mode).start()
    limiter = Limiter(
        lab.settings, lab.metrics, lab.gateway.degraded, time.time, RedisLimitStore(lab.settings)
    )
    limiter.allowances.put("u", UserRecord(rpm=1))
    lab.gateway.limits = limiter
    loop = asyncio.create_task(limiter.run())
    try:
        client = await lab.client()
        answers = [await client.ask(user="u") for _ in range(2)]
        assert [answer.status for answer in answers] == statuses
        if mode == "closed":
            assert answers[0].error["code"] == "limits_unavailable"
            assert "retry-after" in answers[0].headers
        assert lab.metric("penstock_ingress_limits_store_lost") == 1
        assert [(e["what"], e["active"]) for e in await lab.events("degraded")] == [("limits-store", True)]
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await lab.close()


HOSTILE = [
    (b"user: u\r\nuser: v\r\n", {400, 404, 429}),
    (b"user: " + b"x" * 70_000 + b"\r\n", {431}),
    (b"user: a\x00b\r\n", {400}),
    (b"user: a\rb\r\n", {400}),
    (b"user : u\r\n", {400}),
    (b"user:\r\n", {404}),
    (b"user: \xed\xa0\x80\xff\r\n", {404}),
    (b"user: ../../etc/passwd\r\n", {404}),
    (b"user: " + b"%0d%0a" * 80 + b"\r\n", {404}),
    (b"config-profile: " + b"p" * 513 + b"\r\n", {400}),
    (b"x-ratelimit-remaining-requests: 9\r\nx-error-rpm-exceeded: true\r\n", {404}),
    (b"authorization: Bearer " + b"k" * 5000 + b"\r\nauthorization: Bearer j\r\n", {400, 404}),
]


@pytest.mark.parametrize(("lines", "statuses"), HOSTILE, ids=range(len(HOSTILE)))
async def test_what_no_honest_client_sends_is_refused_or_counted_and_the_next_is_served(
    lab: Lab, lines: bytes, statuses: set[int]
) -> None:
    with limited(lab, rpm=1) as (limiter, _):
        limiter.rates.configure({"x": read_document({"profiles": {"default": {"requests_per_second": 1}}})})
        client = await lab.client()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n"
        client.send(head % (lines, len(BODY)) + BODY)
        response = await client.response()
        # There is no instance: whoever passes gets a 404.
        assert response.status in statuses
        assert response.error["message"].isprintable()
        assert (await (await lab.client()).ask(user="next")).status == 404
