"""Requests divided between two instances, byte by byte: what each is sent, and what becomes of failures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.messages import Mode, Placement, Reason, Rejection, ScheduleRequest, Stage
from penstock.common.model import Role
from penstock.common.settings import SettingsError, load
from penstock.ingress.disaggregation.bodies import FORBIDDEN
from penstock.ingress.settings import IngressSettings

from .conftest import LabOf
from .ingress_lab import BODY, STREAM_BODY, Engine, Lab, Peer

KEPT = b'{"choices":[],"kv_transfer_params":{"remote_block_ids":[[1,  2]],"remote_host":"h"}}'
PARAMETERS = {"remote_block_ids": [[1, 2]], "remote_host": "h"}


class Pair:
    """A prefill and a decode engine, and a scheduler that knows no others."""

    def __init__(self, lab: Lab, prefill: Engine, decode: Engine) -> None:
        self.lab, self.prefill, self.decode = lab, prefill, decode
        lab.scheduler.decide = self.decide

    def decide(self, request: ScheduleRequest) -> Placement | Rejection:
        wanted = {Mode.PD_BATCH: ["p", "d"], Mode.PD_STAGED: ["p"], Mode.NEUTRAL: ["d"]}[request.mode]
        wanted = ["d"] if request.stage is Stage.DECODE else wanted
        if set(wanted) & set(request.excluded):
            return Rejection(request.decision_id, Reason.NO_INSTANCE, "all excluded", 1.0)
        prefill = "p" if "p" in wanted else ""
        return Placement(request.decision_id, wanted[-1], prefill, "pairs")


async def pair_of(lab_of: LabOf, protocol: str = "vllm-nixl", **settings: Any) -> Pair:
    lab = await lab_of(pd_disagg_protocol=protocol, **settings)
    prefill = await lab.engine("p", role=Role.PREFILL, group="g")
    return Pair(lab, prefill, await lab.engine("d", role=Role.DECODE, group="g"))


async def asked(engine: Engine) -> tuple[Peer, dict[str, str], dict[str, Any]]:
    """The next request of an engine on a connection of its own: its end of it, headers, body."""
    peer = await engine.accept()
    _, headers, body = await peer.request()
    return peer, headers, json.loads(body)


@pytest.mark.parametrize("staged", [False, True])
async def test_decode_gets_what_prefill_answered_and_the_client_decodes_answer(
    lab_of: LabOf, staged: bool
) -> None:
    pair = await pair_of(lab_of, separate_pd_scheduling=staged)
    client = await pair.lab.client()
    client.post(accept_encoding="gzip", x_request_id="mine", x_custom="kept")
    peer, headers, body = await asked(pair.prefill)
    assert body["max_tokens"] == 1
    assert body["kv_transfer_params"]["do_remote_decode"] is True
    assert "accept-encoding" not in headers
    assert headers["x-custom"] == "kept"
    # Those that the second stage is asked for are of the prefill that was done.
    assert len(pair.lab.account) == (1 if staged else 2)
    peer.answer(KEPT)
    peer, of_decode, body = await asked(pair.decode)
    assert body == json.loads(BODY) | {"kv_transfer_params": PARAMETERS}
    assert of_decode["x-request-id"] == headers["x-request-id"] != "mine"
    assert len(pair.lab.account) == 1
    peer.answer(b'{"answer":1}')
    response = await client.response()
    assert (response.status, response.body) == (200, b'{"answer":1}')
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["target-pod"] == "d"
    assert response.headers["prefill-target-pod"] == "p"
    outcome = await pair.lab.outcome()
    assert (outcome["instance"], outcome["prefill_instance"]) == ("d", "p")
    assert outcome["prefill_ms"] > 0
    assert outcome["decode_ttft_ms"] > 0
    requests = pair.lab.scheduler.requests
    if staged:
        second = requests[1]
        assert (second.mode, second.stage, second.prefill_instance) == (Mode.PD_STAGED, Stage.DECODE, "p")
        assert second.prefill_group == "g"
        assert 25_000 < second.lease_ms <= 30_000
        assert requests[0].decision_id != second.decision_id
    else:
        assert [request.mode for request in requests] == [Mode.PD_BATCH]


async def test_prefills_refusal_is_the_clients_answer(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of)
    client = await pair.lab.client()
    client.post()
    peer, _, _ = await asked(pair.prefill)
    peer.answer(b'{"error":"no such tool"}', "422 Unprocessable Content", "x-why: tools")
    response = await client.response()
    assert (response.status, response.body) == (422, b'{"error":"no such tool"}')
    assert response.headers["x-why"] == "tools"
    assert pair.decode.connections == 0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"<html>", "it answered 200 without JSON"),
        (b'{"kv_transfer_params":' + b"[" * 1100 + b"]" * 1100 + b"}", "it answered 200 without JSON"),
        (b'{"choices":"' + b"x" * 2**20 + b'"}', "it answered with more than 1048576 bytes"),
    ],
)
async def test_an_answer_of_prefill_that_is_of_no_use_is_a_failure(
    lab_of: LabOf, answer: bytes, why: str
) -> None:
    pair = await pair_of(lab_of)
    client = await pair.lab.client()
    client.post()
    peer, _, _ = await asked(pair.prefill)
    peer.answer(answer)
    response = await client.response()
    assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
    assert why in response.error["message"]
    assert pair.decode.connections == 0


@pytest.mark.parametrize("answer", [b'{"kv_transfer_params":null}', b"{}", b'{"kv_transfer_params":7}'])
async def test_without_parameters_decode_computes_the_prompt_itself(lab_of: LabOf, answer: bytes) -> None:
    pair = await pair_of(lab_of)
    client = await pair.lab.client()
    client.post()
    peer, _, _ = await asked(pair.prefill)
    peer.answer(answer)
    peer, _, body = await asked(pair.decode)
    assert body == json.loads(BODY)
    peer.answer()
    assert (await client.response()).status == 200


async def test_prefill_that_takes_too_long_costs_a_retry_or_is_a_504(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, prefill_timeout=0.2)
    client = await pair.lab.client()
    client.post()
    peer, _, _ = await asked(pair.prefill)
    response = await client.response()
    assert (response.status, response.error["code"]) == (504, "upstream_timeout")
    assert "no answer to prefill within 0.2 s" in response.error["message"]
    await peer.gone()


async def test_what_prefill_has_computed_is_served_before_whoever_waits_to_be_computed(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, separate_pd_scheduling=True)
    lab, full = pair.lab, False

    def decide(request: ScheduleRequest) -> Placement | Rejection:
        if full:
            return Rejection(request.decision_id, Reason.SATURATED, "full", 1.0)
        return pair.decide(request)

    lab.scheduler.decide = decide
    computed, fresh = await lab.client(), await lab.client()
    computed.post()
    prefill, _, _ = await asked(pair.prefill)
    full = True
    # This one comes first, and in more of a hurry.
    fresh.post(x_priority="100")
    await eventually(lambda: lab.gateway.waiting._lines.count == 1)
    prefill.answer(KEPT)
    await eventually(lambda: lab.gateway.waiting._lines.count == 2)
    first = lab.gateway.waiting._lines.first(lambda line: True)
    assert first is not None
    assert first.holder.request.stage is Stage.DECODE
    full = False
    decode, _, _ = await asked(pair.decode)
    decode.answer()
    assert (await computed.response()).status == 200
    await again(prefill)
    prefill.answer(KEPT)
    await again(decode)
    decode.answer()
    assert (await fresh.response()).status == 200


async def test_a_lease_that_is_over_before_decode_goes_out_means_another_prefill(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, separate_pd_scheduling=True, prefill_lease=1e-6)
    client = await pair.lab.client()
    client.post()
    peer, _, _ = await asked(pair.prefill)
    peer.answer(KEPT)
    for _ in range(2):
        await again(peer)
        peer.answer(KEPT)
    response = await client.response()
    assert response.status == 502
    assert "lease is over" in response.error["message"]
    assert pair.decode.connections == 0


async def again(peer: Peer) -> tuple[Peer, dict[str, str], dict[str, Any]]:
    """The next request on the same connection."""
    _, headers, body = await peer.request()
    return peer, headers, json.loads(body)


async def test_decode_that_cannot_be_reached_is_replaced_and_the_kept_prompt_used(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of)
    other = await pair.lab.engine("d2", role=Role.DECODE, group="g")
    decide = pair.decide

    def second_best(request: ScheduleRequest) -> Placement | Rejection:
        if "d" in request.excluded:
            return Placement(request.decision_id, "d2", policy="pairs")
        return decide(request)

    pair.lab.scheduler.decide = second_best
    pair.decode.refuse()
    client = await pair.lab.client()
    client.post()
    peer, _, _ = await asked(pair.prefill)
    peer.answer(KEPT)
    peer, _, body = await asked(other)
    assert body["kv_transfer_params"] == PARAMETERS
    peer.answer()
    assert (await client.response()).headers["target-pod"] == "d2"
    assert pair.lab.scheduler.requests[1].stage is Stage.DECODE
    assert pair.prefill.connections == 1


async def test_decode_that_failed_with_parameters_costs_a_new_prefill_once(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, retry_max_count=5)
    pair.lab.scheduler.decide = lambda r: Placement(r.decision_id, "d", "p", "pairs")
    client = await pair.lab.client()
    client.post()
    prefill, _, _ = await asked(pair.prefill)
    prefill.answer(KEPT)
    decode, _, _ = await asked(pair.decode)
    decode.answer(b'{"error":"gone"}', "500 Internal Server Error")
    prefill, _, body = await again(prefill)
    assert body["kv_transfer_params"]["do_remote_decode"] is True
    prefill.answer(KEPT)
    decode, _, _ = await again(decode)
    decode.answer(b'{"error":"gone again"}', "500 Internal Server Error")
    response = await client.response()
    assert (response.status, response.body) == (500, b'{"error":"gone again"}')
    assert len(pair.lab.scheduler.requests) == 2


async def test_a_client_that_leaves_during_prefill_takes_both_along(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, "sglang-mooncake", engine_api_key="k-1")
    client = await pair.lab.client()
    client.post()
    prefill, _, of_prefill = await asked(pair.prefill)
    decode, _, of_decode = await asked(pair.decode)
    assert of_prefill["bootstrap_room"] == of_decode["bootstrap_room"]
    client.close()
    await prefill.gone()
    await decode.gone()
    first, headers, order = await (abort := await pair.prefill.accept()).request()
    assert first.startswith("POST /abort_request ")
    assert headers["authorization"] == "Bearer k-1"
    assert json.loads(order) == {"rid": of_prefill["rid"]}
    abort.answer()
    await eventually(lambda: pair.lab.metric("penstock_ingress_prefill_cancels_total", "arrived"))


async def test_decodes_answer_waits_for_prefill_to_agree(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, "sglang-mooncake")
    client = await pair.lab.client()
    client.post()
    prefill, _, _ = await asked(pair.prefill)
    decode, _, _ = await asked(pair.decode)
    decode.begin_stream()
    wire = decode.event('{"x":1}')
    prefill.answer(b'{"error":"no"}', "400 Bad Request")
    assert (await client.response()).status == 400
    await decode.gone()

    client.post()
    await again(prefill)
    decode, _, _ = await asked(pair.decode)
    decode.begin_stream()
    wire = decode.event('{"x":2}')
    prefill.answer()
    first, _, _ = await client.head()
    assert first == "HTTP/1.1 200 OK"
    assert await client.exactly(len(wire)) == wire
    decode.send(b"0\r\n\r\n")
    assert await client.until(b"0\r\n\r\n") == b"0\r\n\r\n"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_decode_neither_fetches_nor_refuses_is_told_a_second_past_its_lease(
    lab_of: LabOf, stream: bool
) -> None:
    pair = await pair_of(lab_of, prefill_lease=0.2)
    lab = pair.lab
    client = await lab.client()
    client.post(STREAM_BODY if stream else BODY)
    peer, _, _ = await asked(pair.prefill)
    peer.answer(KEPT)
    # Takes the request, and never frees what it is for.
    decode, _, _ = await asked(pair.decode)
    assert lab.metric("penstock_ingress_prompt_holds") == 1
    await eventually(lambda: lab.metric("penstock_ingress_prompt_holds") == 0)
    # Of an answer in one piece nobody here knows when it was fetched.
    assert lab.metric("penstock_ingress_prompt_leaks_total") == stream
    assert lab.metric("penstock_ingress_prompt_holds_unseen_total") == (not stream)
    client.close()
    await decode.gone()
    await lab.settled()


@pytest.mark.parametrize("protocol", ["vllm-nixl", "sglang-mooncake"])
async def test_a_prompt_that_is_fetched_is_kept_no_longer(lab_of: LabOf, protocol: str) -> None:
    pair = await pair_of(lab_of, protocol)
    client = await pair.lab.client()
    client.post(STREAM_BODY)
    peer, _, _ = await asked(pair.prefill)
    peer.answer(KEPT)
    decode, _, _ = await asked(pair.decode)
    decode.begin_stream()
    await eventually(lambda: pair.lab.metric("penstock_ingress_prompt_holds") == 1)
    wire = decode.event('{"x":1}')
    await client.head()
    assert await client.exactly(len(wire)) == wire
    assert pair.lab.metric("penstock_ingress_prompt_holds") == 0
    decode.send(b"0\r\n\r\n")
    await client.until(b"0\r\n\r\n")
    await pair.lab.settled()


@pytest.mark.parametrize("size", [0, 300 * 1024])
@pytest.mark.parametrize("divided", [False, True])
async def test_no_client_says_where_kv_is_fetched(lab_of: LabOf, size: int, divided: bool) -> None:
    lab = await lab_of(**({"pd_disagg_protocol": "vllm-nixl"} if divided else {}))
    engine = await lab.engine("n")
    told = {name: {"remote_host": "evil"} for name in FORBIDDEN}
    body = {**json.loads(BODY), "padding": "x" * size, **told, "seed": 7}
    wire = json.dumps(body).replace("kv_transfer_params", "kv_transfer_param\\u0073").encode()
    client = await lab.client()
    client.post(wire)
    peer, _, got = await asked(engine)
    assert got == {**json.loads(BODY), "padding": "x" * size, "seed": 7}
    peer.answer()
    assert (await client.response()).status == 200


@pytest.mark.parametrize("divided", [False, True])
async def test_nor_does_he_by_the_arguments_that_vllm_merges(lab_of: LabOf, divided: bool) -> None:
    lab = await lab_of(**({"pd_disagg_protocol": "vllm-nixl"} if divided else {}))
    engine = await lab.engine("n")
    client = await lab.client()
    peer: Peer | None = None
    for given, left in (
        ({"kv_transfer_params": "x", "bootstrap_room": 1, "top_a": 0.5}, {"top_a": 0.5}),
        ({"top_a": [1, 2]}, {"top_a": [1, 2]}),
        ("kv_transfer_params", "kv_transfer_params"),
        (None, None),
    ):
        client.post(json.dumps({**json.loads(BODY), "vllm_xargs": given}).encode())
        peer, _, got = await (asked(engine) if peer is None else again(peer))
        assert got == {**json.loads(BODY), "vllm_xargs": left}
        peer.answer()
        assert (await client.response()).status == 200


async def test_a_body_with_allowed_arguments_passes_byte_for_byte(lab: Lab) -> None:
    engine = await lab.engine("n")
    wire = BODY[:-1] + b' ,  "vllm_xargs": {"a" : 1} }'
    client = await lab.client()
    client.post(wire)
    peer = await engine.accept()
    assert (await peer.request())[2] == wire
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_large_body_is_divided_too(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of)
    body = {**json.loads(BODY), "padding": "x" * 300_000, "max_tokens": 9, "kv_transfer_params": 1}
    client = await pair.lab.client()
    client.post(json.dumps(body).encode())
    peer, _, got = await asked(pair.prefill)
    assert (got["max_tokens"], len(got["padding"])) == (1, 300_000)
    peer.answer(KEPT)
    peer, _, got = await asked(pair.decode)
    assert got == body | {"kv_transfer_params": PARAMETERS}
    peer.answer()
    assert (await client.response()).status == 200


@pytest.mark.parametrize("more", [{"n": 2}, {"prompt_logprobs": 1}, {"echo": True}])
async def test_what_cannot_be_divided_goes_to_one_instance(lab_of: LabOf, more: dict[str, Any]) -> None:
    pair = await pair_of(lab_of)
    body = json.loads(BODY) | more
    client = await pair.lab.client()
    client.post(json.dumps(body).encode())
    peer, _, got = await asked(pair.decode)
    assert got == body
    peer.answer()
    response = await client.response()
    assert "prefill-target-pod" not in response.headers
    assert pair.lab.scheduler.requests[0].mode is Mode.NEUTRAL


async def test_a_scheduler_may_leave_it_undivided(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of)
    pair.lab.scheduler.decide = lambda r: Placement(r.decision_id, "d", policy="short")
    client = await pair.lab.client()
    client.post()
    peer, _, got = await asked(pair.decode)
    assert got == json.loads(BODY)
    peer.answer()
    assert "prefill-target-pod" not in (await client.response()).headers


async def test_pd_without_a_protocol_takes_the_engines_or_is_refused(lab: Lab) -> None:
    await lab.engine("n")
    client = await lab.client()
    response = await client.ask(routing_strategy="pd")
    assert (response.status, response.error["code"], response.error["param"]) == (
        400,
        "invalid_strategy",
        "routing-strategy",
    )
    assert "kv_connector" in response.error["message"]
    prefill = await lab.engine("p", role=Role.PREFILL, labels={"kv_connector": "NixlConnector"})
    pair = Pair(lab, prefill, await lab.engine("d", role=Role.DECODE))
    client.post(routing_strategy="pd")
    peer, _, body = await asked(prefill)
    assert body["kv_transfer_params"]["do_remote_decode"] is True
    assert lab.scheduler.requests[-1].strategy == ""
    peer.answer(KEPT)
    peer, _, _ = await asked(pair.decode)
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_record_without_what_the_protocol_needs_is_told(lab_of: LabOf) -> None:
    pair = await pair_of(lab_of, "vllm-kvt")
    client = await pair.lab.client()
    response = await client.ask()
    assert response.status == 502
    assert "its record lacks kv_address" in response.error["message"]
    assert (pair.prefill.connections, pair.decode.connections) == (0, 0)


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--pd-disagg-protocol", "vllm"], "protocol 'vllm' is unknown: one of vllm-kvt, vllm-mooncake"),
        (
            ["--pd-disagg-protocol", "sglang-mooncake", "--separate-pd-scheduling"],
            "staged is done by vllm-kvt, vllm-mooncake, vllm-nixl",
        ),
    ],
)
def test_what_a_protocol_cannot_do_stops_the_start(argv: list[str], fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(IngressSettings, argv, prog="penstock ingress", environ={})
    assert fault in " ".join(caught.value.faults)
