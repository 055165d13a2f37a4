"""The prober against real servers: good, broken and hostile ones. No answer makes it raise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.instances import encode_instance
from penstock.common.model import Endpoint, EngineLoad, Instance
from penstock.common.subjects import INSTANCES
from penstock.discovery.adapters.prober import http_prober
from penstock.discovery.allowed import parse_allowed
from penstock.discovery.http_answer import MAX_ANSWER_BYTES, Answer, BadAnswer
from penstock.discovery.ports import Reading
from penstock.discovery.reconcile import Verdict

if TYPE_CHECKING:
    from services.discovery.tests.conftest import Engine

AMPLE_S = 10.0
SHORT_S = 0.2
OK = b"HTTP/1.1 200 OK\r\n"


async def check(endpoint: Endpoint, timeout_s: float = AMPLE_S, api_key: str = "") -> Verdict:
    async with http_prober(timeout_s, api_key) as prober:
        return await prober.check(endpoint)


async def read_load(endpoint: Endpoint, timeout_s: float = AMPLE_S) -> Reading:
    async with http_prober(timeout_s) as prober:
        return await prober.read_load(endpoint)


@asynccontextmanager
async def speaking(*pieces: bytes, endless: bytes = b"") -> AsyncIterator[Endpoint]:
    """A server that answers every connection with these bytes, then closes, or repeats `endless`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.writelines(pieces)
            while endless:
                writer.write(endless)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


async def test_a_healthy_engine_names_its_models_lora_adapters_and_owner(engine: Engine) -> None:
    engine.models = [
        {"id": "zeta", "owned_by": "vllm", "parent": None, "permission": [{"x": 1}]},
        {"id": "adapter", "owned_by": "someone", "parent": "zeta"},
        {"id": "alpha", "owned_by": "vllm"},
        {"id": "alpha", "owned_by": "vllm"},
    ]
    verdict = await check(engine.endpoint)
    assert verdict == Verdict(
        models=("alpha", "zeta"), lora_adapters=("adapter",), owner="vllm", engine="vllm"
    )


async def test_an_engine_without_a_health_path_is_judged_by_its_models(engine: Engine) -> None:
    engine.health_status = 404
    assert (await check(engine.endpoint)).models == ("m",)
    assert engine.hits == {"/health": 1, "/v1/models": 1}


async def test_an_engine_without_a_list_of_models_is_healthy_and_names_none(engine: Engine) -> None:
    engine.models_status = 404
    assert await check(engine.endpoint) == Verdict()


async def test_an_owner_that_is_no_engine_names_none(engine: Engine) -> None:
    engine.models = [{"id": "m", "owned_by": "acme"}]
    verdict = await check(engine.endpoint)
    assert (verdict.owner, verdict.engine) == ("acme", "")


async def test_a_name_that_resolves_to_an_address_that_is_not_allowed_is_not_connected_to(
    engine: Engine,
) -> None:
    async with http_prober(AMPLE_S, allowed=parse_allowed("10.0.0.0/8")) as prober:
        verdict = await prober.check(Endpoint("localhost", engine.port))
    assert (verdict.fault, engine.hits) == ("forbidden", {})


async def test_an_engine_that_closes_after_each_answer_is_probed_over_several_connections() -> None:
    body = b'{"data": [{"id": "m"}]}'
    async with speaking(OK + b"content-length: %d\r\n\r\n" % len(body) + body) as endpoint:
        assert (await check(endpoint)).models == ("m",)


@pytest.mark.parametrize(
    "answer",
    [
        b"content-length: 23\r\n\r\n{DOC}",
        b"connection: close\r\n\r\n{DOC}",
        b"transfer-encoding: chunked\r\n\r\n17\r\n{DOC}\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n17;x=y\r\n{DOC}\r\n0\r\nTrailer: t\r\n\r\n",
        b"Content-Length: 23\r\ncontent-length: 23\r\n\r\n{DOC}",
    ],
)
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_an_answer_is_read_alike_however_it_is_cut(answer: bytes, size: int) -> None:
    answer = OK + answer.replace(b"{DOC}", b'{"data": [{"id": "m"}]}')
    read = Answer()
    for at in range(0, len(answer), size):
        if not read.done:
            read.feed(answer[at : at + size])
    read.end()
    assert (read.status, bytes(read.body)) == (200, b'{"data": [{"id": "m"}]}')


@pytest.mark.parametrize(
    "answer",
    [
        b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
        b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"content-length: 5\r\n\r\nhello, and more",
        b"x : y\r\n\r\n",
        b"a: b\r\n folded\r\n\r\n",
        b"a: b\x00\r\n\r\n",
        b"content-length: +5\r\n\r\nhello",
    ],
)
def test_an_answer_that_could_be_read_in_two_ways_is_refused(answer: bytes) -> None:
    with pytest.raises(BadAnswer):
        Answer().feed(OK + answer)


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_bytes_break_the_reader(noise: bytes, size: int) -> None:
    for head in (b"", OK, OK + b"transfer-encoding: chunked\r\n\r\n"):
        read = Answer()
        with contextlib.suppress(BadAnswer):
            for at in range(0, len(head + noise), size):
                read.feed((head + noise)[at : at + size])
            read.end()
        assert len(read.body) <= MAX_ANSWER_BYTES


async def test_the_key_is_sent_as_a_bearer_token(engine: Engine) -> None:
    await check(engine.endpoint, api_key="s3cret")
    assert engine.headers["Authorization"] == "Bearer s3cret"


async def test_without_a_key_no_authorization_is_sent(engine: Engine) -> None:
    await check(engine.endpoint)
    assert "Authorization" not in engine.headers


@pytest.mark.parametrize(
    ("setting", "value", "fault", "reason"),
    [
        ("health_status", 503, "status", "/health answers 503"),
        ("models_status", 500, "status", "/v1/models answers 500"),
        ("models_status", 401, "status", "/v1/models answers 401 (does it need --engine-api-key?)"),
        ("redirect_to", "http://127.0.0.1:1/", "redirect", "/health answers with a redirect"),
        ("body_bytes", MAX_ANSWER_BYTES + 1, "too_large", "/health answers with more than"),
        ("models", [], "no_models", "/v1/models lists no model"),
        ("models", [{"id": "l", "parent": "m"}], "no_models", "/v1/models lists no model"),
        ("models", [{"id": ""}], "malformed", "/v1/models is not a list of models"),
        ("models", [{"id": "x" * 513}], "malformed", "/v1/models is not a list of models"),
        ("models", [{"id": 7}], "malformed", "/v1/models is not a list of models"),
        ("models", [{"name": "m"}], "malformed", "/v1/models is not a list of models"),
        ("models", [[]], "malformed", "/v1/models is not a list of models"),
        ("models", b"", "malformed", "/v1/models is not a list of models"),
        ("models", b"\xff\xfe", "malformed", "/v1/models is not a list of models"),
        ("models", b'{"data": [{"id": "\\ud800"}]}', "malformed", "/v1/models is not a list of models"),
        ("models", b"[" * 500_000, "malformed", "/v1/models is not a list of models"),
        ("models", [{"id": f"m{n}"} for n in range(1025)], "too_large", "/v1/models lists too many names"),
        ("models", [{"id": f"{n:0512}"} for n in range(200)], "too_large", "/v1/models lists too many names"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_bad_answer_is_a_failed_probe_with_a_reason(
    engine: Engine, setting: str, value: Any, fault: str, reason: str
) -> None:
    setattr(engine, setting, value)
    verdict = await check(engine.endpoint)
    assert (verdict.fault, verdict.models) == (fault, ())
    assert verdict.reason.startswith(reason)


async def test_the_largest_list_that_passes_fits_into_a_record(engine: Engine) -> None:
    engine.models = [{"id": f"{n:0507}", "owned_by": "o" * 512} for n in range(112)]
    verdict = await check(engine.endpoint)
    assert len(verdict.models) == 112
    longest = Instance(
        id="i" * 512,
        endpoint=Endpoint("h" * 253, 65535),
        models=verdict.models,
        owner=verdict.owner,
        reason="r" * 512,
        source="s" * 128,
    )
    assert len(encode_instance(longest)) < INSTANCES.max_value_bytes


async def test_a_redirect_is_not_followed(
    engine: Engine, new_engine: Callable[[], Awaitable[Engine]]
) -> None:
    target = await new_engine()
    engine.redirect_to = f"http://127.0.0.1:{target.port}/health"
    await check(engine.endpoint)
    assert target.hits == {}


async def test_an_engine_that_hangs_fails_by_the_timeout(engine: Engine) -> None:
    engine.answering.clear()
    assert await check(engine.endpoint, SHORT_S) == Verdict("timeout", "no answer within 0.2 s")
    assert await read_load(engine.endpoint, SHORT_S) == Reading()


async def test_a_closed_port_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert await check(Endpoint("127.0.0.1", port)) == Verdict("refused", "connection refused")


async def test_a_name_that_does_not_exist_cannot_be_resolved() -> None:
    assert (await check(Endpoint("engine.invalid", 80))).fault in ("name", "timeout")


@pytest.mark.parametrize(
    ("pieces", "endless", "faults"),
    [
        ([b""], b"", {"disconnected"}),
        ([b"\x16\x03\x01\x02\x00garbage\r\n\r\n"], b"", {"malformed"}),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], b"", {"malformed"}),
        ([OK + b"content-length: 100\r\n\r\nshort"], b"", {"malformed"}),
        ([OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n"], b"", {"malformed"}),
        ([OK + b"content-length: -5\r\n\r\n"], b"", {"malformed"}),
        ([OK + b"x: " + b"y" * 100_000 + b"\r\n\r\n"], b"", {"malformed"}),
        ([OK], b"x-header: value\r\n", {"malformed", "timeout"}),
        ([OK + b"\r\n"], b" " * 65536, {"too_large"}),
        ([], b"HTTP/1.1 100 Continue\r\n\r\n", {"malformed", "timeout"}),
        ([b"HTTP/1.1 99999 ?\r\n\r\n"], b"", {"malformed"}),
    ],
)
async def test_a_peer_that_does_not_speak_proper_http_is_a_failed_probe(
    pieces: list[bytes], endless: bytes, faults: set[str]
) -> None:
    async with speaking(*pieces, endless=endless) as endpoint:
        verdict = await check(endpoint, 1.0 if endless else AMPLE_S)
        assert verdict.fault in faults
        assert verdict.reason


async def test_a_compressed_answer_is_not_inflated(engine: Engine) -> None:
    body = b"\x1f\x8b\x08\x00" + b"\x00" * 50
    head = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with speaking(head, body) as endpoint:
        assert (await check(endpoint)).fault == "malformed"


async def test_load_is_read_from_the_metrics(engine: Engine) -> None:
    assert await read_load(engine.endpoint) == Reading(EngineLoad(running=3, waiting=1), "vllm")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("sglang:num_running_reqs 1", "sglang"),
        ("vllm:num_requests_running 1", "vllm"),
        ("trtllm_request_success_total 1", "tensorrt-llm"),
        ("my_vllm:num_requests_running 1", ""),
        ("# vllm:num_requests_running 1", ""),
    ],
)
async def test_an_engine_is_known_by_its_metrics(engine: Engine, line: str, kind: str) -> None:
    engine.metrics = f"# HELP x y\n{line}\n"
    assert (await read_load(engine.endpoint)).engine == kind


@pytest.mark.parametrize("text", ["", "# nothing\n", "vllm:num_requests_running NaN\n"])
async def test_metrics_that_say_nothing_of_load_are_no_load(engine: Engine, text: str) -> None:
    engine.metrics = text
    assert (await read_load(engine.endpoint)).load is None


async def test_metrics_over_the_bound_are_no_load(engine: Engine) -> None:
    engine.body_bytes = MAX_ANSWER_BYTES + 1
    assert await read_load(engine.endpoint) == Reading()


async def test_an_engine_on_ipv6_is_probed() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"data": [{"id": "m"}]}'
        writer.write(OK + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    try:
        server = await asyncio.start_server(talk, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with server:
        assert (await check(Endpoint("::1", server.sockets[0].getsockname()[1]))).models == ("m",)
