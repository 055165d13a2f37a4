"""The admin listener, asked over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from penstock.common.adapters.probes import AdminListener, local
from penstock.common.lifecycle import Lifecycle
from penstock.common.telemetry import Metrics


class Listening:
    """A listener and what it reports on."""

    def __init__(self) -> None:
        self.metrics, self.lifecycle, self.lacks = Metrics(), Lifecycle(), "no listing yet"
        self.lifecycle.require("registry", lambda: self.lacks)
        self.listener = AdminListener("127.0.0.1", 0, self.lifecycle.missing, local(self.metrics.snapshot))

    async def get(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.listener.port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()


@pytest.fixture
async def listening() -> AsyncIterator[Listening]:
    listening = Listening()
    await listening.listener.start()
    yield listening
    await listening.listener.close()


async def test_a_process_that_answers_is_alive_whether_ready_or_not(listening: Listening) -> None:
    assert (await listening.get("/livez"))[0] == 200


async def test_readiness_says_what_is_missing_and_turns_with_it(listening: Listening) -> None:
    status, text = await listening.get("/readyz")
    assert (status, "registry: no listing yet" in text) == (503, True)
    listening.lacks = ""
    assert (await listening.get("/readyz"))[0] == 200
    listening.lifecycle.stopping.set()
    status, text = await listening.get("/readyz")
    assert (status, "draining" in text) == (503, True)


async def test_metrics_are_in_the_text_format_with_cumulative_buckets(listening: Listening) -> None:
    metrics = listening.metrics
    metrics.counter("penstock_requests_total", "Requests", "model").inc('a "quoted"\nname', by=2)
    metrics.gauge("penstock_open", "Open streams", lambda: 3)
    latency = metrics.histogram("penstock_latency_seconds", "Latency", "path", bounds=(0.1, 1.0))
    for value in (0.05, 0.5, 0.6, 7.0):
        latency.labels("bus").observe(value)
    status, text = await listening.get("/metrics")
    assert status == 200
    lines = text.splitlines()
    for line in (
        "# TYPE penstock_requests_total counter",
        r'penstock_requests_total{model="a \"quoted\"\nname"} 2.0',
        "# TYPE penstock_open gauge",
        "penstock_open 3.0",
        "# TYPE penstock_latency_seconds histogram",
        'penstock_latency_seconds_bucket{le="0.1",path="bus"} 1.0',
        'penstock_latency_seconds_bucket{le="1.0",path="bus"} 3.0',
        'penstock_latency_seconds_bucket{le="+Inf",path="bus"} 4.0',
        'penstock_latency_seconds_count{path="bus"} 4.0',
        'penstock_latency_seconds_sum{path="bus"} 8.15',
    ):
        assert line in lines


async def test_other_paths_are_not_found(listening: Listening) -> None:
    assert (await listening.get("/debug"))[0] == 404


async def test_a_port_that_is_taken_is_an_error_at_the_start(listening: Listening) -> None:
    second = AdminListener("127.0.0.1", listening.listener.port, list, local(Metrics().snapshot))
    with pytest.raises(OSError, match="address already in use"):
        await second.start()
    await second.close()
