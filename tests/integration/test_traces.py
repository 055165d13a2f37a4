"""Traces of real processes: one for each sampled request, from the ingress over the bus to the engine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from integration.otlp_receiver import OtlpReceiver, Received
from integration.servers import Process, eventually
from integration.stack import Stack, chat, metric, running_stack

pytestmark = pytest.mark.integration

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SERVER, CALL = 2, 3


@pytest.fixture
async def receiver() -> AsyncIterator[OtlpReceiver]:
    async with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
async def stack(receiver: OtlpReceiver) -> AsyncIterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_scheduler("--otlp-endpoint", receiver.endpoint)
        # None by chance: those only whose client says so.
        stack.start_ingress("--otlp-endpoint", receiver.endpoint, "--trace-sample-ratio", "0")
        await stack.ready()
        yield stack


async def test_a_request_is_one_trace_over_processes_and_a_lost_collector_harms_nobody(
    stack: Stack, receiver: OtlpReceiver
) -> None:
    admin = stack.ingresses[0].admin_port
    async with aiohttp.ClientSession() as session:
        assert (await chat(session, stack.url, "not traced", headers={"x-request-id": "plain"}))[0] == 200
        headers = {"traceparent": CLIENT, "x-request-id": "traced"}
        status, _, answer = await chat(session, stack.url, "a secret prompt", headers=headers)
        assert status == 200
        await eventually(lambda: len(receiver.of_request("traced")) == 4)
        assert not receiver.of_request("plain")
        _check(receiver.of_request("traced"), answer["usage"])
        received = b"".join(receiver.raw)
        assert b"secret" not in received
        assert answer["choices"][0]["message"]["content"].encode() not in received
        # The engine got the call's own context.
        (call,) = [s for s in receiver.of_request("traced") if s.name.startswith("chat ")]
        async with session.get(f"http://{stack.engines[0]}/sim/state") as response:
            seen = json.dumps(await response.json())
        assert f"00-{call.trace_id}-{call.span_id}-01" in seen
        # And the log names the trace.
        process = stack.ingresses[0].process
        await eventually(
            lambda: process.find('"request_id":"traced".*"trace_id":"0af7651916cd43dd8448eb211c80319c"')
        )

        receiver.status = 400
        for _ in range(3):
            assert (await chat(session, stack.url, "again", headers={"traceparent": CLIENT}))[0] == 200
        await eventually(partial(_counted, session, admin, "failed"))
        assert (await chat(session, stack.url, "still well"))[0] == 200
        receiver.status = 200
        headers = {"traceparent": CLIENT.replace("0af", "1af"), "x-request-id": "after"}
        assert (await chat(session, stack.url, "recovered", headers=headers))[0] == 200
        await eventually(lambda: len(receiver.of_request("after")) == 4)
        assert await metric(session, admin, "penstock_trace_spans_total")


async def test_a_divided_request_is_one_trace_over_both_engines(
    receiver: OtlpReceiver, tmp_path: Path
) -> None:
    profiles = tmp_path / "profiles.yaml"
    profiles.write_text("sim-model: {profiles: {default: {disaggregation: {protocol: vllm-nixl}}}}")
    with running_stack() as stack:
        for role in ("prefill", "decode"):
            stack.start_sims(1, "--role", role, "--kv-connector", "nixl")
        prefill, decode = stack.engines
        stack.engines = [f"prefill@{prefill}", f"decode@{decode}"]
        stack.start_discovery()
        otlp = "--otlp-endpoint", receiver.endpoint
        stack.start_scheduler(*otlp)
        stack.start_ingress(*otlp, "--trace-sample-ratio", "0", "--profiles-file", str(profiles))
        await stack.ready()
        async with aiohttp.ClientSession() as session:
            headers = {"traceparent": CLIENT, "x-request-id": "pair"}
            status, said, _ = await chat(session, stack.url, "in two", headers=headers)
            assert (status, said["prefill-target-pod-ip"]) == (200, prefill)
            await eventually(lambda: len(receiver.of_request("pair")) == 6)
            named = {span.name: span for span in receiver.of_request("pair")}
            root, call = named["POST /v1/chat/completions"], named["chat sim-model"]
            assert {span.trace_id for span in named.values()} == {CLIENT[3:35]}
            assert (named["schedule"].parent_id, call.parent_id) == (root.span_id, root.span_id)
            assert named["decide"].parent_id == named["schedule"].span_id
            assert (named["prefill"].parent_id, named["decode"].parent_id) == (call.span_id, call.span_id)
            assert named["prefill"].end_ns <= named["decode"].start_ns
            for engine in (prefill, decode):
                async with session.get(f"http://{engine}/sim/state") as response:
                    assert f"00-{call.trace_id}-{call.span_id}-01" in json.dumps(await response.json())


async def _counted(session: aiohttp.ClientSession, port: int, result: str) -> bool:
    async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
        text = await response.text()
    return bool(re.search(rf'^penstock_trace_spans_total{{result="{result}"}} [1-9]', text, re.MULTILINE))


def _check(spans: list[Received], usage: dict[str, int]) -> None:
    named = {span.name: span for span in spans}
    root, schedule = named["POST /v1/chat/completions"], named["schedule"]
    decide, call = named["decide"], named["chat sim-model"]
    assert {span.trace_id for span in spans} == {CLIENT[3:35]}
    assert root.parent_id == CLIENT[36:52]
    assert (schedule.parent_id, call.parent_id) == (root.span_id, root.span_id)
    assert decide.parent_id == schedule.span_id
    assert {s.service for s in (root, schedule, call)} == {"penstock-ingress"}
    assert decide.service == "penstock-scheduler"
    assert [s.kind for s in (root, schedule, decide, call)] == [SERVER, CALL, SERVER, CALL]
    assert not any(span.error for span in spans)
    for span in (schedule, call):
        assert root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns
    for span in (root, call):
        assert span.attributes["gen_ai.request.model"] == "sim-model"
        assert span.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert span.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert span.attributes["http.response.status_code"] == 200
    assert decide.attributes["penstock.decision_id"] == schedule.attributes["penstock.decision_id"]
    assert decide.attributes["penstock.instance"] == call.attributes["penstock.instance"]
    assert call.events == ("first piece",)


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, penstock.ingress.__main__, penstock.ingress.worker, penstock.scheduler.process;"
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'google', 'requests'))])"
    )
    process = Process([sys.executable, "-c", code])
    process.assert_exit(0, 60.0)
    assert process.stdout == "[]"


def test_a_bad_endpoint_stops_the_start() -> None:
    for endpoint in ("collector:4318", "ftp://collector", "http://user:secret@collector:4318"):
        process = Process.module("penstock.scheduler", "--otlp-endpoint", endpoint)
        process.assert_exit(2, 60.0)
        assert "--otlp-endpoint" in process.stderr
