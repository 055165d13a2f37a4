"""The load generator counts good answers only, against a simulated engine and against liars."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from penstock.cli.bench import BenchSettings, Measured, report
from penstock.cli.load import PROMPT_BYTES, Exchange, Result, exchanges, run_round
from penstock.sim.instance import Instance
from penstock.sim.settings import SimSettings
from penstock.sim.text import DEFAULT_MODEL

GOOD = b'{"choices":[{"message":{"content":"yes"}}]}'


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[str]:
    """Answers each request on a connection with these bytes; with none it hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(answer)
            if not answer:
                break
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def test_every_answer_of_an_engine_is_the_expected_one() -> None:
    settings = SimSettings(config=None, instant=True)
    async with Instance(settings.spec(), settings.profile(), host="127.0.0.1", port=0) as instance:
        result = await run_round([instance.url], exchanges(DEFAULT_MODEL, "random"), 4, 0.1)
    assert result.failures == []
    assert len(result.latencies_s) >= 4
    assert result.rate_rps > 0


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (http(GOOD.replace(b"yes", b"no")), "another answer than expected"),
        (http(b"busy", "503 Service Unavailable"), "status 503"),
        (http(b"{}"), "not an answer"),
        (http(b'{"choices":[]}'), "not an answer"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "without content-length"),
        (b"", "connection lost"),
    ],
)
async def test_anything_else_is_a_failure(answer: bytes, failure: str) -> None:
    async with server(answer) as url:
        result = await run_round([url], [Exchange(b"GET / HTTP/1.1\r\n\r\n", "yes")], 2, 0.05)
    assert len(result.failures) == 2
    assert all(failure in text for text in result.failures)
    assert result.latencies_s == []


def test_requests_have_a_prompt_of_1_kb_and_begin_differently() -> None:
    made = exchanges(DEFAULT_MODEL, "")
    bodies = [exchange.request.partition(b"\r\n\r\n")[2] for exchange in made]
    assert all(PROMPT_BYTES < len(body) < PROMPT_BYTES + 128 for body in bodies)
    assert len({body[:100] for body in bodies}) == len(bodies)


def test_percentiles_are_of_the_answers_in_order() -> None:
    result = Result(2.0, [number / 1000 for number in range(100, 0, -1)])
    assert (result.percentile_ms(50), result.percentile_ms(99), result.rate_rps) == (51.0, 100.0, 50.0)


def test_the_report_gives_ratio_cost_and_failures() -> None:
    measured = Measured(
        Result(1.0, [0.001] * 200),
        Result(1.0, [0.002] * 100, ["status 503: busy"] * 3),
        {"ingress": 0.01, "scheduler": 0.002},
    )
    words = [line.split() for line in report(BenchSettings(config=None), measured).splitlines()]
    assert ["direct", "200", "1.00", "1.00", "0", "1.00"] in words
    assert ["gateway", "100", "2.00", "2.00", "3", "0.50"] in words
    assert ["ingress", "100"] in words
    assert ["scheduler", "20"] in words
    assert ["failed", "3", "times:", "status", "503:", "busy"] in words
