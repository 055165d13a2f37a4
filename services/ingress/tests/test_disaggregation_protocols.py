"""What prefill and decode receive, field by field, for each protocol and mode."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.model import Endpoint, Instance, Role
from penstock.common.profiles import STAGED
from penstock.ingress.disaggregation.bodies import FORBIDDEN, divisible, edited, members
from penstock.ingress.disaggregation.protocol import Answer, Order, Pair, ProtocolError, Question
from penstock.ingress.disaggregation.protocols import PROTOCOLS, find
from penstock.ingress.disaggregation.sglang_mooncake import room
from penstock.ingress.disaggregation.vllm_kvt import kv_endpoint

PREFILL = Instance(
    id="p0",
    endpoint=Endpoint("10.0.0.1", 8000),
    role=Role.PREFILL,
    kv_address="10.1.0.1:5557",
    bootstrap_port=8999,
    dp_rank=1,
    dp_size=2,
)
DECODE = Instance(id="d0", endpoint=Endpoint("10.0.0.2", 8000), role=Role.DECODE, dp_rank=3, dp_size=4)
PAIR = Pair(PREFILL, DECODE, "req-1", "xfer-1", 987_654_321_987_654_321)
BODY = (
    b'{"model":"m","messages":[{"role":"user","content":"hi \\u00e9"}],"stream":true,"max_tokens":64,'
    b'"stream_options":{"include_usage":true},"min_tokens":3,"temperature":0.10,"tools":[{"type":"function"}]}'
)
# What prefill's body is without the members that speak of more than one token.
REST = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi é"}],
    "temperature": 0.1,
    "tools": [{"type": "function"}],
    "max_tokens": 1,
}
HOLD = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def received(name: str, *, staged: bool, answer: Answer = Answer()) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: B008
    """The bodies of prefill and decode, in plain types."""
    protocol, parts = find(name, staged=staged), members(BODY)
    prefill, decode = protocol.prefill(PAIR, parts), protocol.decode(PAIR, answer)
    return msgspec.json.decode(edited(parts, prefill)), msgspec.json.decode(edited(parts, decode))


def sent_by_client(**more: Any) -> dict[str, Any]:
    return {**msgspec.json.decode(BODY), **more}


def test_kvt_batched_sends_decode_alone_where_prefill_is() -> None:
    assert find("vllm-kvt", staged=False).order is Order.DECODE_ONLY
    _, decode = received("vllm-kvt", staged=False)
    params = {"remote_host": "10.1.0.1", "remote_port": 5557}
    assert decode == sent_by_client(kv_transfer_params=params)


def test_kvt_staged_asks_prefill_first_and_copies_nothing() -> None:
    assert find("vllm-kvt", staged=True).order is Order.PREFILL_FIRST
    prefill, decode = received("vllm-kvt", staged=True)
    assert prefill == {**REST, "stream": True, "kv_transfer_params": {"do_remote_decode": True}}
    params = {"remote_host": "10.1.0.1", "remote_port": 5557, "do_remote_prefill": True}
    assert decode == sent_by_client(kv_transfer_params=params)


@pytest.mark.parametrize("staged", [False, True])
def test_nixl_passes_what_prefill_returned_on_as_it_is(staged: bool) -> None:
    given_back = (
        b'{"do_remote_prefill":true,"remote_block_ids":[[1,2]],"remote_port":18501,"tp_size":1,"x":1e2}'
    )
    answer = Answer(msgspec.Raw(given_back))
    prefill, decode = received("vllm-nixl", staged=staged, answer=answer)
    assert prefill == {**REST, "stream": False, "kv_transfer_params": HOLD}
    assert decode == sent_by_client(kv_transfer_params=msgspec.json.decode(given_back))
    protocol = find("vllm-nixl", staged=staged)
    assert b'"kv_transfer_params":' + given_back in edited(members(BODY), protocol.decode(PAIR, answer))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", ["vllm-nixl", "vllm-mooncake"])
def test_without_parameters_decode_computes_the_prompt(name: str, staged: bool) -> None:
    _, decode = received(name, staged=staged)
    assert decode == sent_by_client()


@pytest.mark.parametrize("staged", [False, True])
def test_mooncake_of_the_older_generation(staged: bool) -> None:
    params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_host": "h", "remote_port": 7}
    answer = Answer(msgspec.Raw(msgspec.json.encode(params)))
    prefill, decode = received("vllm-mooncake", staged=staged, answer=answer)
    transfer = {**HOLD, "transfer_id": "xfer-1"}
    assert prefill == {**REST, "stream": False, "kv_transfer_params": transfer}
    assert decode == sent_by_client(kv_transfer_params=params)
    assert find("vllm-mooncake", staged=staged).question(PAIR, answer) is None


@pytest.mark.parametrize("staged", [False, True])
def test_mooncake_of_the_current_generation_asks_the_bootstrap_server(staged: bool) -> None:
    protocol = find("vllm-mooncake", staged=staged)
    assert protocol.order is Order.PREFILL_FIRST
    assert protocol.question(PAIR, Answer()) == Question(8999, "/query")
    asked = {"0": {"engine_id": "other"}, "1": {"engine_id": "e-1", "worker_addr": {}}}
    prefill, decode = received("vllm-mooncake", staged=staged, answer=Answer(asked=asked))
    # The same for both generations: prefill's answer tells which one it is.
    assert prefill == {**REST, "stream": False, "kv_transfer_params": {**HOLD, "transfer_id": "xfer-1"}}
    params = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://10.0.0.1:8999",
        "remote_engine_id": "e-1",
        "transfer_id": "xfer-1",
    }
    assert decode == sent_by_client(kv_transfer_params=params)


@pytest.mark.parametrize(
    "asked", [[], {}, {"1": 3}, {"1": {}}, {"1": {"engine_id": ""}}, {"0": {"engine_id": "e"}}]
)
def test_a_bootstrap_server_that_does_not_name_the_engine_is_an_error(asked: object) -> None:
    with pytest.raises(ProtocolError, match="rank 1"):
        find("vllm-mooncake", staged=False).decode(PAIR, Answer(asked=asked))


def test_sglang_meets_in_a_room_of_decodes_rank() -> None:
    protocol = find("sglang-mooncake", staged=False)
    assert protocol.order is Order.TOGETHER
    prefill, decode = received("sglang-mooncake", staged=False)
    meeting = {"rid": "xfer-1", "bootstrap_host": "10.0.0.1", "bootstrap_port": 8999}
    number = decode.pop("bootstrap_room")
    assert prefill.pop("bootstrap_room") == number
    assert prefill == {**REST, "stream": False, **meeting}
    assert decode == sent_by_client(**meeting)
    assert number % 4 == 3
    cancel = protocol.cancel(PAIR)
    assert cancel is not None
    assert (cancel.path, cancel.body) == ("/abort_request", {"rid": "xfer-1"})


def test_sglang_without_a_port_in_the_record_takes_the_usual_one() -> None:
    pair = msgspec.structs.replace(PAIR, prefill=msgspec.structs.replace(PREFILL, bootstrap_port=0))
    assert find("sglang-mooncake", staged=False).decode(pair, Answer()).sets["bootstrap_port"] == 8998


@given(st.integers(0, 2**63 - 1), st.integers(0, 4096), st.integers(0, 4096))
def test_rooms_fit_and_tell_the_rank(draw: int, rank: int, size: int) -> None:
    number = room(draw, rank, size)
    assert 0 <= number < 2**63 - 1
    assert number % max(1, size) == rank % max(1, size)


def test_prefill_writes_one_token_whichever_way_the_client_asks() -> None:
    parts = members(b'{"model":"m","messages":[1],"max_completion_tokens":9}')
    for modes in PROTOCOLS.values():
        for protocol in modes.values():
            body = msgspec.json.decode(edited(parts, protocol.prefill(PAIR, parts)))
            assert (body["max_tokens"], body["max_completion_tokens"]) == (1, 1)


def test_what_is_between_gateway_and_engines_does_not_come_from_clients() -> None:
    body = b"{" + b",".join(b'"%b":{"a":1}' % name.encode() for name in sorted(FORBIDDEN)) + b',"model":"m"}'
    assert list(members(body)) == ["model"]


@pytest.mark.parametrize(
    ("path", "more", "divided"),
    [
        (b"/v1/chat/completions", {}, True),
        (b"/v1/completions", {"n": 1, "echo": False, "best_of": None}, True),
        (b"/v1/embeddings", {}, False),
        (b"/v1/chat/completions", {"n": 2}, False),
        (b"/v1/completions", {"best_of": 4}, False),
        (b"/v1/completions", {"echo": True}, False),
        (b"/v1/completions", {"prompt_logprobs": 1}, False),
        (b"/v1/completions", {"use_beam_search": True}, False),
    ],
)
def test_which_requests_are_divided(path: bytes, more: dict[str, Any], divided: bool) -> None:
    assert divisible(path, members(msgspec.json.encode({"model": "m", **more}))) is divided


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("10.0.0.1:5557", ("10.0.0.1", 5557)),
        ("[fe80::1]:5557", ("fe80::1", 5557)),
        ("host", None),
        ("", None),
        (":5557", None),
        ("host:0", None),
        ("host:65536", None),
        ("host:9999999999", None),
        ("host:x", None),
    ],
)
def test_kv_addresses(address: str, endpoint: tuple[str, int] | None) -> None:
    instance = msgspec.structs.replace(PREFILL, kv_address=address)
    assert kv_endpoint(instance) == endpoint
    assert bool(find("vllm-kvt", staged=False).missing(instance)) is (endpoint is None)


def test_what_a_protocol_cannot_do_is_said_with_what_can() -> None:
    with pytest.raises(ValueError, match="staged is done by vllm-kvt, vllm-mooncake, vllm-nixl"):
        find("sglang-mooncake", staged=True)
    with pytest.raises(ValueError, match="'nixl' is unknown: one of vllm-kvt"):
        find("nixl", staged=False)
    assert [name for name, modes in PROTOCOLS.items() if STAGED not in modes] == ["sglang-mooncake"]
