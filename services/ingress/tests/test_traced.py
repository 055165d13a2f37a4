"""A traced request: its spans, what engines and schedulers are told, and that others notice nothing."""

import json
import random
import time

import pytest
from integration.servers import eventually

from penstock.common.messages import Reason, Rejection, ScheduleRequest
from penstock.common.tracing import Sampler, Span, Spans, read_traceparent, unpack
from penstock.ingress.traced import Tracing

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, STREAM_BODY, Engine, Lab
from .test_divided import KEPT, pair_of

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
USAGE = b'{"usage":{"prompt_tokens":70,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":48}}}'


def trace(lab: Lab, ratio: float, inbound_per_s: float = 1000) -> Spans:
    """Switch tracing on, as a worker does."""
    spans = Spans(lab.metrics)
    sampler = Sampler(ratio, inbound_per_s, random.Random(1).random, time.monotonic)
    lab.gateway.sample = Tracing(lab.gateway, sampler, spans, time.time_ns).sampling()
    return spans


@pytest.fixture
def spans(lab: Lab) -> Spans:
    return trace(lab, 1.0)


def by_name(spans: Spans) -> dict[str, Span]:
    ended = spans.take(100)
    named = {span.name: span for span in ended}
    assert len(named) == len(ended)
    assert all(span.end_ns >= span.start_ns > 0 for span in ended)
    return named


async def test_a_request_is_one_trace_whose_context_the_scheduler_and_the_engine_get(
    lab: Lab, engine: Engine, spans: Spans
) -> None:
    client = await lab.client()
    client.post(traceparent=PARENT, tracestate="a=b")
    peer = await engine.accept()
    _, headers, _ = await peer.request()
    peer.answer(USAGE)
    assert (await client.response()).status == 200
    outcome = await lab.outcome()
    named = by_name(spans)
    root, schedule, call = named[f"POST {CHAT}"], named["schedule"], named["chat m"]
    assert {span.trace_id.hex() for span in named.values()} == {PARENT[3:35]} == {outcome["trace_id"]}
    assert (root.kind, schedule.kind, call.kind) == ("server", "client", "client")
    assert f"{root.parent_id:016x}" == PARENT[36:52]
    assert schedule.parent_id == call.parent_id == root.span_id
    told = read_traceparent(headers["traceparent"].encode())
    assert told == (call.context, True)
    assert headers["tracestate"] == "a=b"
    # Nobody is asked whether he is traced while none of them is.
    assert lab.gateway.placer.marks is None
    ((mark,),) = [batch.traces for batch in lab.scheduler.batches]
    assert (mark.decision_id, unpack(mark.context)) == (outcome["decisions"][0], schedule.context)
    usage = {
        "gen_ai.usage.input_tokens": 70,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 48,
    }
    assert root.attributes.items() >= usage.items()
    assert root.attributes["http.response.status_code"] == 200
    expected = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "server.port": engine.port}
    assert call.attributes.items() >= (expected | usage).items()
    assert [event.name for event in call.events] == ["first piece"]
    told_of_all = json.dumps([span.attributes for span in named.values()])
    assert '"hi"' not in told_of_all


async def test_a_request_that_is_not_sampled_passes_untouched(lab: Lab, engine: Engine) -> None:
    spans = trace(lab, 0.0)
    client = await lab.client()
    unsampled = PARENT[:-1] + "0"
    client.post(traceparent=unsampled)
    peer = await engine.accept()
    _, headers, _ = await peer.request()
    assert headers["traceparent"] == unsampled
    peer.answer()
    assert (await client.response()).status == 200
    assert "trace_id" not in await lab.outcome()
    assert [batch.traces for batch in lab.scheduler.batches] == [()]
    assert spans.take(1) == []


@pytest.mark.parametrize("hostile", ["00-zz", PARENT + "-more", "x" * 4000, "00-" + "0" * 32 + PARENT[35:]])
async def test_a_hostile_context_is_not_continued_and_goes_no_further(
    lab: Lab, engine: Engine, spans: Spans, hostile: str
) -> None:
    client = await lab.client()
    client.post(traceparent=hostile, tracestate="secret=1")
    peer = await engine.accept()
    _, headers, _ = await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    named = by_name(spans)
    assert named[f"POST {CHAT}"].parent_id == 0
    assert read_traceparent(headers["traceparent"].encode()) == (named["chat m"].context, True)
    assert "tracestate" not in headers


async def test_a_retry_is_a_second_call_and_an_event(lab_of: LabOf) -> None:
    lab = await lab_of(retry_max_count=1)
    spans, engine, other = trace(lab, 1.0), await lab.engine("a"), await lab.engine("z")
    client = await lab.client()
    client.post(body=STREAM_BODY)
    first = await engine.accept()
    await first.request()
    first.reset()
    second = await other.accept()
    await second.request()
    second.begin_stream()
    second.event("[DONE]")
    second.send(b"0\r\n\r\n")
    assert (await client.response()).status == 200
    await lab.settled()
    ended = spans.take(100)
    root = ended[-1]
    assert [span.name for span in ended[:-1]] == ["schedule", "chat m", "schedule", "chat m"]
    assert [span.error for span in ended] == ["", "lost", "", "", ""]
    assert [event.name for event in root.events] == ["attempt failed", "retry"]
    assert root.attributes["penstock.attempts"] == 2


async def test_waiting_is_a_span_of_its_own(lab: Lab, engine: Engine, spans: Spans) -> None:
    full = True

    def decide(request: ScheduleRequest) -> object:
        if full:
            return Rejection(request.decision_id, Reason.SATURATED, "full", 1.0)
        return lab.scheduler.first(request)

    lab.scheduler.decide = decide  # type: ignore[assignment]  # of the lab
    client = await lab.client()
    client.post()
    await eventually(lambda: lab.gateway.waiting.busy)
    full = False
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    await lab.settled()
    ended = spans.take(100)
    assert [span.name for span in ended] == ["schedule", "waiting", "chat m", f"POST {CHAT}"]
    assert ended[0].error == "saturated"
    # Decisions while it waits belong to the wait.
    assert unpack(lab.scheduler.batches[-1].traces[0].context) == ended[1].context


async def test_a_refused_request_is_a_trace_without_an_error(lab: Lab, spans: Spans) -> None:
    client = await lab.client()
    assert (await client.ask(BODY.replace(b'"m"', b'"nobody"'))).status == 404
    (root,) = spans.take(10)
    assert root.attributes["http.response.status_code"] == 404
    assert root.attributes["penstock.outcome"] == "rejected"
    assert root.error == ""
    assert "gen_ai.request.model" not in root.attributes


@pytest.mark.parametrize("staged", [False, True])
async def test_a_divided_request_is_one_trace_with_a_span_for_either_half(
    lab_of: LabOf, staged: bool
) -> None:
    pair = await pair_of(lab_of, separate_pd_scheduling=staged)
    spans = trace(pair.lab, 1.0)
    client = await pair.lab.client()
    client.post(traceparent=PARENT)
    prefill = await pair.prefill.accept()
    _, of_prefill, _ = await prefill.request()
    prefill.answer(KEPT)
    decode = await pair.decode.accept()
    _, of_decode, _ = await decode.request()
    decode.answer(USAGE)
    assert (await client.response()).status == 200
    outcome = await pair.lab.outcome()
    ended = spans.take(100)
    assert {span.trace_id.hex() for span in ended} == {PARENT[3:35]} == {outcome["trace_id"]}
    (root,) = [span for span in ended if span.name == f"POST {CHAT}"]
    calls = [span for span in ended if span.name == "chat m"]
    halves = {span.name: span for span in ended if span.kind == "internal"}
    assert len(ended) == 4 + len(calls) + staged
    assert len(calls) == 1 + staged
    assert {span.parent_id for span in calls} == {root.span_id}
    for (name, half), call, told in zip(
        sorted(halves.items(), reverse=True), calls * (2 - staged), (of_prefill, of_decode), strict=True
    ):
        assert name == ("prefill" if told is of_prefill else "decode")
        assert half.attributes["penstock.instance"] == name[0]
        assert half.parent_id == call.span_id
        assert call.start_ns <= half.start_ns <= half.end_ns <= call.end_ns
        # The engine's own spans are children of the call.
        assert read_traceparent(told["traceparent"].encode()) == (call.context, True)
    assert halves["prefill"].end_ns <= halves["decode"].start_ns
    assert calls[-1].attributes["gen_ai.usage.output_tokens"] == 5


async def test_a_pair_that_fails_ends_its_spans_with_it(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of)
    spans = trace(pair.lab, 1.0)
    client = await pair.lab.client()
    client.post()
    prefill = await pair.prefill.accept()
    await prefill.request()
    prefill.answer(b'{"error":"no"}', "422 Unprocessable Content")
    assert (await client.response()).status == 422
    await pair.lab.outcome()
    named = by_name(spans)
    assert set(named) == {f"POST {CHAT}", "schedule", "chat m", "prefill"}
    client.post()
    await prefill.request()
    prefill.answer(KEPT)
    decode = await pair.decode.accept()
    await decode.request()
    client.close()
    await pair.lab.settled()
    named = by_name(spans)
    assert named["prefill"].end_ns <= named["decode"].end_ns <= named["chat m"].end_ns
