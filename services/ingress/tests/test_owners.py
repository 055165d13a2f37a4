"""Whose instances a request wants: by body, header and query, and what the instance gets of it."""

from __future__ import annotations

import json

import pytest

from penstock.common.instances import InstanceTable
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import parse_request
from penstock.ingress.large_bodies import Facts, Setup, Task, read
from penstock.ingress.openai import parse
from penstock.ingress.owners import Owners, said_in_head, split_query, without_owner
from penstock.ingress.request_body import InferenceRequest

from .ingress_lab import BODY, CHAT, MODEL, Engine, Lab

# What body, header and query say: nothing, `owned_by` (and an alias), or an alias alone; and what counts.
TABLE = """
--- -     --o q.owned_by    --a q.engine
-o- h.owned_by  -oo h.owned_by  -oa h.owned_by
-a- h.engine    -ao h.engine    -aa h.engine
o-- b.owned_by  o-o b.owned_by  o-a b.owned_by
oo- b.owned_by  ooo b.owned_by  ooa b.owned_by
oa- b.owned_by  oao b.owned_by  oaa b.owned_by
a-- b.engine    a-o b.engine    a-a b.engine
ao- b.engine    aoo b.engine    aoa b.engine
aa- b.engine    aao b.engine    aaa b.engine
"""
CASES = list(zip(TABLE.split()[::2], TABLE.split()[1::2], strict=True))
SAYS = {
    "-": {"owned_by": "", "engine": "", "inference_server": ""},
    "o": {"owned_by": "owned_by", "engine": "engine", "inference_server": "inference_server"},
    "a": {"engine": "engine", "inference_server": "inference_server"},
}


def test_the_table_is_complete() -> None:
    assert len({row for row, _ in CASES}) == 27


@pytest.mark.parametrize(("row", "wanted"), CASES, ids=[row for row, _ in CASES])
def test_body_before_header_before_query_and_owned_by_before_its_aliases(row: str, wanted: str) -> None:
    body, header, query = (
        {name: f"{source}.{text}" if text else "" for name, text in SAYS[said].items()}
        for source, said in zip("bhq", row, strict=True)
    )
    fields = "".join(f"X-{name.replace('_', '-').title()}: {text}\r\n" for name, text in header.items())
    search = "&".join(f"{name}={text}" for name, text in query.items())
    head = parse_request(f"POST {CHAT}?{search} HTTP/1.1\r\nhost: g\r\n{fields}".encode())
    inference = parse(CHAT.encode(), "", json.dumps({"model": "m", "messages": [1], **body}).encode())
    assert (inference.owner or said_in_head(head.read) or "-") == wanted


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"owned_by": " vLLM "}, "vLLM"),
        ({"owned_by": None, "engine": "e"}, "e"),
        ({"owned_by": "  ", "inference_server": "i"}, "i"),
        ({"owned_by": ""}, ""),
    ],
)
def test_blank_and_null_say_nothing(said: dict[str, object], wanted: str) -> None:
    body = json.dumps({"model": "m", "messages": [1], **said}).encode()
    inference = parse(CHAT.encode(), "", body)
    assert inference.owner == wanted
    assert json.loads(inference.body) == {"model": "m", "messages": [1]}


@pytest.mark.parametrize("name", ["owned_by", "engine", "inference_server"])
@pytest.mark.parametrize("value", [7, True, [], {}, ["vllm"], "x" * 513])
def test_an_owner_that_is_no_sane_string_is_refused(name: str, value: object) -> None:
    body = json.dumps({"model": "m", "messages": [1], name: value}).encode()
    with pytest.raises(GatewayError) as caught:
        parse(CHAT.encode(), "", body)
    assert (caught.value.code, caught.value.param) == ("invalid_request", name)


def test_a_body_without_an_owner_is_not_touched() -> None:
    body = b'{ "model":"m",  "messages":["owned_by"], "metadata":{"engine":"x"} }'
    assert parse(CHAT.encode(), "", body) == InferenceRequest("m", False, b'["owned_by"]', 0)


def test_what_stays_of_a_body_stays_byte_for_byte() -> None:
    body = '{"owned_by":"x" , "model" :"m","messages":[ {"engine" : 1.50e3, "t":"\\u00e4ä"} ],"engine":null}'
    assert without_owner(body.encode()).decode() == (
        '{"model":"m","messages":[ {"engine" : 1.50e3, "t":"\\u00e4ä"} ]}'
    )


@pytest.mark.parametrize(
    ("target", "owner", "rest"),
    [
        (b"/v1/x", b"", b"/v1/x"),
        (b"/v1/x?", b"", b"/v1/x?"),
        (b"/v1/x?a=1&b", b"", b"/v1/x?a=1&b"),
        (b"/v1/x?owned_by=a", b"a", b"/v1/x"),
        (b"/v1/x?a=1&owned_by=a&b=2", b"a", b"/v1/x?a=1&b=2"),
        (b"/v1/x?owned_by=a%20b&owned_by=c+d", b"c d", b"/v1/x"),
        (b"/v1/x?owned_by=&engine=e", b"e", b"/v1/x"),
        (b"/v1/x?engine=%FF%zz", b"\xff%zz", b"/v1/x"),
    ],
)
def test_a_query_loses_what_it_says_of_the_owner(target: bytes, owner: bytes, rest: bytes) -> None:
    assert split_query(target) == (owner, rest)


def test_the_admin_api_keeps_its_query() -> None:
    head = parse_request(b"DELETE /admin/api/routing?model=m&owned_by=o HTTP/1.1\r\nhost: g\r\n")
    assert head.origin_form == b"/admin/api/routing?model=m&owned_by=o"


def test_a_large_body_is_read_and_rewritten_by_the_helper() -> None:
    body = json.dumps({"engine": "vllm", "model": "m", "messages": ["x" * 300_000]}).encode()
    facts = read(Task(CHAT.encode(), "", len(body)), body, Setup("", 256))
    assert isinstance(facts, Facts)
    assert (facts.owner, json.loads(facts.body)) == ("vllm", {"model": "m", "messages": ["x" * 300_000]})


async def test_the_instance_gets_neither_field_nor_query(lab: Lab) -> None:
    engine = await lab.engine(owner="Acme")
    client = await lab.client()
    client.post(BODY[:-1] + b',"owned_by":"acme"}', f"{CHAT}?engine=other&x=1")
    peer = await engine.accept()
    first, _, body = await peer.request()
    assert (first, body) == (
        f"POST {CHAT}?x=1 HTTP/1.1",
        json.dumps(json.loads(BODY), separators=(",", ":")).encode(),
    )
    peer.answer()
    assert (await client.response()).status == 200
    assert lab.scheduler.requests[-1].owner == "Acme"


async def test_an_unknown_owner_is_told_which_there_are(lab: Lab, engine: Engine) -> None:
    lab.instance("a", 1, owner="vllm")
    lab.instance("b", 1, owner="sglang", owners={MODEL: "team"})
    response = await (await lab.client()).ask(x_owned_by="nobody")
    assert (response.status, response.error["code"], response.error["param"]) == (
        404,
        "model_not_found",
        "owned_by",
    )
    assert response.error["message"].endswith("owners: team, vllm")
    assert lab.scheduler.requests == []


async def test_models_are_listed_by_owner(lab: Lab) -> None:
    lab.instance("a", 1, owner="vllm")
    lab.instance("b", 1, owner="vllm")
    lab.instance("c", 1, owner="sglang", models=(MODEL, "n"), owners={"n": "team"})
    for query, wanted in (
        ("", [(MODEL, "sglang"), (MODEL, "vllm"), ("n", "team")]),
        ("?owned_by=VLLM", [(MODEL, "vllm")]),
        ("?owned_by=nobody", []),
    ):
        client = await lab.client()
        client.send(f"GET /v1/models{query} HTTP/1.1\r\nhost: g\r\n\r\n".encode())
        listed = json.loads((await client.response()).body)["data"]
        assert [(one["id"], one["owned_by"]) for one in listed] == wanted


def test_a_model_that_nobody_serves_is_told_which_there_are() -> None:
    assert (
        Owners(InstanceTable()).unknown_model("m").message
        == "The model 'm' does not exist; there are no models"
    )
