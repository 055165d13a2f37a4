"""The admin API on a memory bus: what it lets in, what it answers, and that nothing breaks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from pydantic import Field

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.codec import encode_record
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.live_config import DRAIN, MAPPING, PROFILE
from penstock.common.messages import (
    CompleteMarker,
    DiscoverReply,
    DiscoverRequest,
    ExplainReply,
    Mode,
    ScheduleRequest,
    Stage,
)
from penstock.common.model import Endpoint, Instance, InstanceState
from penstock.common.routing_events import CandidateTerms, Explained, PlacementEvent
from penstock.common.subjects import CONFIG, DEFAULT_SHARD, DISCOVER, EXPLAIN_NOW, INSTANCES
from penstock.ingress.admin.access import Access
from penstock.ingress.admin.documents import Documents
from penstock.ingress.admin.operations import MAX_BODY_BYTES, Strict
from penstock.ingress.admin.resources import Resource
from penstock.ingress.admin.router import Router
from penstock.ingress.admin.service import AdminService, api_document
from penstock.ingress.admin_messages import AdminRequest

TOKEN = "a-token-of-the-admin"
LOCAL = {"host": "127.0.0.1:8081"}
A = Instance(
    id="a.ns_1", endpoint=Endpoint("10.0.0.1", 80), models=("org/m",), owner="vllm", source="kubernetes"
)
B = Instance(id="b", endpoint=Endpoint("10.0.0.2", 80), models=("org/m", "n"), owner="sglang", group="g")
DOWN = Instance(
    id="down",
    endpoint=Endpoint("10.0.0.3", 80),
    models=("n",),
    state=InstanceState.UNHEALTHY,
    reason="its probe failed",
)


class Tuning(Strict):
    """A kind of document, for the tests."""

    weight: float = Field(ge=0, le=1)
    note: str = ""


class Lab:
    """The API, and what it stands on."""

    def __init__(self, token: str = "") -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        access = Access(lambda: token)
        self.service = AdminService(self.bus, None, access)
        tunings = Documents(
            Resource("tunings", PROFILE, Tuning, "tuning"), self.service.config, self.service.writer
        )
        self.router = Router([*self.service.router.operations, *tunings.operations()], access)

    async def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        raw: bytes = b"",
        public: bool = False,
    ) -> tuple[int, Any]:
        request = AdminRequest(
            method=method,
            target=target,
            headers=LOCAL if headers is None else headers,
            body=raw or (json.dumps(body).encode() if body is not None else b""),
            peer="127.0.0.1",
            public=public,
        )
        response = await self.router.handle(request)
        return response.status, json.loads(response.body) if response.body else None

    async def add(self, *records: Instance) -> None:
        await self.bus.ensure_bucket(INSTANCES)
        for record in records:
            await self.bus.put(INSTANCES, instance_key(record.id), encode_instance(record))
        marker = encode_record(CompleteMarker("s", ("s",)))
        await self.bus.put(INSTANCES, complete_key("s"), marker)
        await eventually(lambda: len(self.service.table) >= len(records))


@asynccontextmanager
async def running(token: str = "") -> AsyncIterator[Lab]:
    lab = Lab(token)
    tasks = [asyncio.create_task(loop, name=name) for name, loop in lab.service.loops()]
    await eventually(lambda: lab.service.config.synced)
    try:
        yield lab
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def eventually(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # a condition of several objects, with a deadline
            await asyncio.sleep(0.005)


def error(answer: tuple[int, Any]) -> tuple[int, str, str | None]:
    status, body = answer
    assert set(body["error"]) == {"message", "type", "code", "param"}
    return status, body["error"]["code"], body["error"]["param"]


async def test_the_mirror_configuration_is_one_document_that_is_checked() -> None:
    path = "/admin/api/mirror"
    async with running() as lab:
        assert error(await lab.ask("GET", path)) == (404, "not_found", "name")
        assert error(await lab.ask("PUT", path, {"Ratio": 101}))[:2] == (400, "invalid_request")
        assert error(await lab.ask("PUT", path, {"Target": "ftp://a"}))[:2] == (400, "invalid_request")
        wanted = {"Enable": True, "Target": "http://a", "Ratio": 5.0, "Authorization": "Bearer a"}
        status, shown = await lab.ask("PUT", path, wanted)
        assert (status, shown["value"], shown["origin"]) == (201, wanted, "admin")
        assert (await lab.ask("GET", path))[1] == shown
        assert (await lab.ask("DELETE", path))[0] == 200


# -- who may ask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (401, "invalid_admin_token", "authorization")),
        ({"authorization": ""}, (401, "invalid_admin_token", "authorization")),
        ({"authorization": "Bearer"}, (401, "invalid_admin_token", "authorization")),
        ({"authorization": "Bearer wrong"}, (401, "invalid_admin_token", "authorization")),
        ({"authorization": f"Bearer {TOKEN}x"}, (401, "invalid_admin_token", "authorization")),
        ({"authorization": f"Basic {TOKEN}"}, (401, "invalid_admin_token", "authorization")),
        ({"authorization": "Bearer \udcff"}, (401, "invalid_admin_token", "authorization")),
    ],
)
@pytest.mark.parametrize("public", [True, False])
async def test_with_a_token_set_nobody_gets_in_without_it(
    headers: dict[str, str], expected: tuple[int, str, str], public: bool
) -> None:
    lab = Lab(TOKEN)
    for target in ("/admin/api/instances", "/admin/api/openapi.json", "/admin/nowhere"):
        assert error(await lab.ask("GET", target, headers=headers, public=public)) == expected


@pytest.mark.parametrize("public", [True, False])
async def test_the_token_opens_from_anywhere(public: bool) -> None:
    headers = {"authorization": f"bearer {TOKEN}", "host": "gateway.example", "origin": "https://console"}
    status, _ = await Lab(TOKEN).ask("GET", "/admin/api/instances", headers=headers, public=public)
    assert status == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8081", "127.0.0.1:8081", "[::1]:8081", "127.8.9.1"])
async def test_without_a_token_programs_on_this_machine_get_in(host: str) -> None:
    assert (await Lab().ask("GET", "/admin/api/instances", headers={"host": host}))[0] == 200
    same = {"host": host, "origin": f"http://{host}"}
    assert (await Lab().ask("GET", "/admin/api/instances", headers=same))[0] == 200


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({}, "host"),
        ({"host": "evil.example"}, "host"),
        ({"host": "10.0.0.7:8081"}, "host"),
        ({"host": "127.0.0.1.evil.example"}, "host"),
        ({"host": "[::1"}, "host"),
        ({**LOCAL, "origin": "https://evil.example"}, "origin"),
        ({**LOCAL, "origin": "null"}, "origin"),
        ({**LOCAL, "origin": "http://127.0.0.1:9999"}, "origin"),
    ],
)
async def test_without_a_token_a_web_page_does_not_get_in(headers: dict[str, str], param: str) -> None:
    answer = await Lab().ask("POST", "/admin/discover", headers=headers)
    assert error(answer) == (403, "forbidden", param)


async def test_without_a_token_nothing_is_on_the_public_port() -> None:
    assert error(await Lab().ask("GET", "/admin/api/instances", public=True))[0] == 404


async def test_who_asks_is_kept_with_the_change() -> None:
    async with running() as lab:
        await lab.ask("PUT", "/admin/api/tunings/a", {"weight": 1}, {**LOCAL, "x-admin-user": "ops@corp"})
        assert (await lab.ask("GET", "/admin/api/tunings/a"))[1]["by"] == "ops@corp at 127.0.0.1"
        answer = await lab.ask("GET", "/admin/api/tunings", headers={**LOCAL, "x-admin-user": "a\nb"})
        assert error(answer) == (400, "invalid_request", "x-admin-user")


# -- documents --------------------------------------------------------------------------------------------


async def test_a_document_is_written_read_changed_and_deleted_with_versions() -> None:
    async with running() as lab:
        path = "/admin/api/tunings/org%2Fmodel"
        assert error(await lab.ask("GET", path)) == (404, "not_found", "name")
        status, first = await lab.ask("PUT", path, {"weight": 0.5})
        assert (status, first["name"], first["version"], first["value"]) == (
            201,
            "org/model",
            1,
            {"weight": 0.5},
        )
        status, second = await lab.ask("PUT", f"{path}?expected_version=1", {"weight": 1})
        assert (status, second["version"], second["origin"]) == (200, 2, "admin")
        conflict = await lab.ask("PUT", f"{path}?expected_version=1", {"weight": 0})
        assert error(conflict) == (409, "version_conflict", "expected_version")
        assert (await lab.ask("GET", "/admin/api/tunings"))[1] == {"documents": [second], "total": 1}
        assert (await lab.ask("DELETE", path))[0] == 200
        assert error(await lab.ask("DELETE", path)) == (404, "not_found", "name")
        status, past = await lab.ask("GET", f"{path}/versions")
        assert (past["deleted"], [one["version"] for one in past["versions"]]) == (True, [2, 1])


async def test_an_earlier_version_is_written_again_as_a_further_one() -> None:
    async with running() as lab:
        path = "/admin/api/tunings/a"
        for weight in (0, 0.5, 1):
            await lab.ask("PUT", path, {"weight": weight})
        status, back = await lab.ask("POST", f"{path}/rollback?version=2")
        assert (status, back["version"], back["value"]) == (200, 4, {"weight": 0.5})
        assert error(await lab.ask("POST", f"{path}/rollback?version=9")) == (404, "not_found", "version")
        assert error(await lab.ask("POST", f"{path}/rollback")) == (400, "invalid_request", "version")
        await lab.ask("DELETE", path)
        assert error(await lab.ask("POST", f"{path}/rollback?version=5")) == (404, "not_found", "version")
        assert (await lab.ask("POST", f"{path}/rollback?version=4"))[1]["value"] == {"weight": 0.5}


async def test_an_earlier_version_that_is_not_valid_any_more_is_refused() -> None:
    async with running() as lab:
        await lab.service.writer.put(PROFILE, "a", {"weight": 7}, "an older release", "file")
        await lab.ask("PUT", "/admin/api/tunings/a", {"weight": 1})
        answer = await lab.ask("POST", "/admin/api/tunings/a/rollback?version=1")
        assert error(answer) == (400, "invalid_request", "weight")


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"null", None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b'{"weight": "heavy"}', "weight"),
        (b'{"weight": NaN}', None),
        (b'{"weight": 1e999}', "weight"),
        (b'{"weight": 2}', "weight"),
        (b'{"weight": 1, "wight": 2}', "wight"),
        (b'{"weight": 1, "note": "\xff"}', None),
        (b'{"weight": 1, "note": "\\ud800"}', None),
        (b'{"weight": 1, "note": ' + b"1" * 10_000 + b"}", None),
    ],
)
async def test_a_body_that_is_not_valid_is_refused_with_its_field(raw: bytes, param: str | None) -> None:
    async with running() as lab:
        status, code, named = error(await lab.ask("PUT", "/admin/api/tunings/a", raw=raw or b" "))
        assert (status, code) == (400, "invalid_request")
        assert param is None or named == param
        assert lab.service.config.get(PROFILE, "a") is None


async def test_bodies_are_bounded() -> None:
    async with running() as lab:
        over = b'{"weight": 1, "note": "' + b"x" * MAX_BODY_BYTES + b'"}'
        assert error(await lab.ask("PUT", "/admin/api/tunings/a", raw=over))[:2] == (413, "request_too_large")
        # Within the bound of a body, and over that of a record with what stands around it.
        full = b'{"weight": 1, "note": "' + b"x" * (MAX_BODY_BYTES - 30) + b'"}'
        assert error(await lab.ask("PUT", "/admin/api/tunings/a", raw=full))[:2] == (413, "request_too_large")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/", 404),
        ("/admin", 404),
        ("/admin/api/", 404),
        ("/admin/api/tunings/", 400),
        ("/admin/api/tunings/a%00b", 400),
        ("/admin/api/tunings/%FF", 400),
        ("/admin/api/tunings/%ED%A0%80", 400),
        ("/admin/api/tunings/" + "x" * 600, 400),
        ("/admin/api/tunings/a/b/c", 404),
        ("/admin/api/tunings?x=1", 400),
        ("/admin/api/tunings/a?expected_version=1&expected_version=2", 400),
        ("/admin/api/tunings/a?" + "&".join(f"x{n}=1" for n in range(100)), 400),
        ("/admin/api/tunings/a?%FF=%FF", 400),
        ("/admin/api/tunings/../../x", 404),
    ],
)
async def test_odd_targets_are_refused(target: str, status: int) -> None:
    async with running() as lab:
        assert error(await lab.ask("GET", target))[0] == status


async def test_another_method_is_told_which_are_taken() -> None:
    response = await Lab().router.handle(
        AdminRequest(method="PATCH", target="/admin/api/routing", headers=LOCAL)
    )
    assert (response.status, response.headers["allow"]) == (405, "GET, POST, DELETE")


async def test_without_the_bus_changes_are_refused_and_reading_goes_on() -> None:
    async with running() as lab:
        await lab.ask("PUT", "/admin/api/tunings/a", {"weight": 1})
        lab.broker.set_up(False)
        assert error(await lab.ask("PUT", "/admin/api/tunings/a", {"weight": 0}))[:2] == (
            503,
            "bus_unavailable",
        )
        assert (await lab.ask("GET", "/admin/api/tunings/a"))[1]["value"] == {"weight": 1}


# -- instances --------------------------------------------------------------------------------------------


async def test_instances_are_listed_with_the_reason_why_one_takes_no_requests() -> None:
    async with running() as lab:
        await lab.add(A, B, DOWN)
        _, listed = await lab.ask("GET", "/admin/api/instances")
        assert (listed["total"], listed["taking_requests"]) == (3, 2)
        shown = {
            one["id"]: (one["state"], one["takes_requests"], one["reason"]) for one in listed["instances"]
        }
        assert shown == {
            "a.ns_1": ("ready", True, ""),
            "b": ("ready", True, ""),
            "down": ("unhealthy", False, "its probe failed"),
        }
        assert (await lab.ask("GET", "/admin/api/instances/b"))[1]["owners"] == {
            "org/m": "sglang",
            "n": "sglang",
        }


async def test_a_drain_is_a_document_until_it_is_taken_back() -> None:
    async with running() as lab:
        await lab.add(A, B)
        status, drained = await lab.ask("POST", "/admin/api/instances/b/drain", {"reason": "new driver"})
        assert (status, drained["takes_requests"], drained["drain"]["reason"]) == (200, False, "new driver")
        document = lab.service.config.get(DRAIN, "b")
        assert document is not None
        assert (document.value, document.by) == ({"reason": "new driver"}, "admin at 127.0.0.1")
        status, back = await lab.ask("POST", "/admin/api/instances/b/undrain")
        assert (status, back["takes_requests"], back["drain"]) == (200, True, None)
        assert lab.service.config.get(DRAIN, "b") is None
        assert error(await lab.ask("POST", "/admin/api/instances/b/undrain"))[0] == 409
        assert error(await lab.ask("POST", "/admin/api/instances/x/drain"))[0] == 404
        assert error(await lab.ask("POST", "/admin/api/instances/x/undrain"))[0] == 404
        assert (await lab.ask("POST", "/admin/api/instances/b/drain"))[0] == 200


# -- routing ----------------------------------------------------------------------------------------------


async def test_routes_are_found_and_mapped_by_hand() -> None:
    async with running() as lab:
        await lab.add(A, B, DOWN)
        _, found = await lab.ask("GET", "/admin/api/routing")
        keys = [(r["model"], r["owned_by"], r["service_name"], r["ready"]) for r in found["routes"]]
        assert keys == [
            ("n", "", "down", False),
            ("n", "sglang", "g", True),
            ("org/m", "sglang", "g", True),
            ("org/m", "vllm", "a.ns_1", True),
        ]
        body = {"model": "org/m", "owned_by": "vllm", "service_name": "g"}
        status, made = await lab.ask("POST", "/admin/api/routing", body)
        assert (status, made["source"], made["endpoints"]) == (201, "manual", ["http://10.0.0.2:80"])
        assert (await lab.ask("POST", "/admin/api/routing", body))[0] == 200
        _, listed = await lab.ask("GET", "/admin/api/routing")
        assert [r["service_name"] for r in listed["routes"] if r["source"] == "manual"] == ["g"]
        assert listed["total"] == 4
        query = "/admin/api/routing?model=org%2Fm&owned_by=vllm"
        assert (await lab.ask("DELETE", query))[1] == {"deleted": True, "model": "org/m", "owned_by": "vllm"}
        assert error(await lab.ask("DELETE", query))[0] == 404
        assert error(await lab.ask("DELETE", "/admin/api/routing?model=m")) == (
            400,
            "invalid_request",
            "owned_by",
        )


@pytest.mark.parametrize("service", ["a", "a.ns", "a.ns_1", "10.0.0.1", "10.0.0.1:80", "g", "b"])
async def test_a_service_is_named_by_any_of_its_names(service: str) -> None:
    async with running() as lab:
        await lab.add(A, B)
        body = {"model": "org/m", "owned_by": "o", "service_name": service}
        assert (await lab.ask("POST", "/admin/api/routing", body))[0] == 201


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"model": "m", "owned_by": "o", "service_name": "nope"}, (404, "not_found", "service_name")),
        ({"model": "m", "owned_by": "o"}, (400, "invalid_request", "service_name")),
        ({"model": 7, "owned_by": "o", "service_name": "b"}, (400, "invalid_request", "model")),
        ({"model": "m", "owned_by": "o/p", "service_name": "b"}, (400, "invalid_request", "owned_by")),
        ({"model": "", "owned_by": "o", "service_name": "b"}, (400, "invalid_request", "model")),
        ({"model": "m", "owned_by": "o", "service_name": "b", "x": 1}, (400, "invalid_request", "x")),
    ],
)
async def test_a_mapping_that_makes_no_sense_is_refused(body: Any, expected: tuple[int, str, str]) -> None:
    async with running() as lab:
        await lab.add(B)
        assert error(await lab.ask("POST", "/admin/api/routing", body)) == expected
        assert dict(lab.service.config.documents(MAPPING)) == {}


async def test_a_service_that_is_to_come_can_be_mapped_by_force() -> None:
    async with running() as lab:
        body = {"model": "m", "owned_by": "o", "service_name": "to-come"}
        status, made = await lab.ask("POST", "/admin/api/routing?force=true", body)
        assert (status, made["ready"], made["endpoints"]) == (201, False, [])


# -- discover ---------------------------------------------------------------------------------------------


async def test_discovery_is_asked_until_it_is_done() -> None:
    async with running() as lab:
        asked: list[DiscoverRequest] = []

        def answer(request: DiscoverRequest) -> DiscoverReply:
            asked.append(request)
            return DiscoverReply("d1", "7", len(asked) > 2, 5, ("a",), ("b",), 4, ("source redis: away",))

        assert error(await lab.ask("POST", "/admin/discover"))[:2] == (503, "bus_unavailable")
        await lab.bus.serve(DISCOVER, answer)
        status, found = await lab.ask("POST", "/admin/discover")
        assert asked == [DiscoverRequest(), *[DiscoverRequest("7", "d1")] * 2]
        assert (status, found) == (
            200,
            {
                "discovered": 5,
                "added": ["a"],
                "removed": ["b"],
                "unchanged": 4,
                "errors": ["source redis: away"],
            },
        )


async def test_a_body_where_none_is_taken_is_refused_by_its_fields() -> None:
    async with running() as lab:
        await lab.bus.serve(DISCOVER, lambda _: DiscoverReply("d1", "", True, 2, (), (), 2, ()))
        bodies: dict[bytes, str | None] = {
            b'{"source": "x", "b": 1}': "source",
            b"[1]": None,
            b"nonsense": None,
        }
        for raw, field in bodies.items():
            status, answer = await lab.ask("POST", "/admin/discover", raw=raw)
            assert (status, answer["error"]["code"], answer["error"]["param"]) == (
                400,
                "invalid_request",
                field,
            )
        assert (
            "source"
            in (await lab.ask("POST", "/admin/discover", raw=b'{"source": 1}'))[1]["error"]["message"]
        )
        for raw in (b"", b"{}"):
            assert (await lab.ask("POST", "/admin/discover", raw=raw))[0] == 200
        assert error(await lab.ask("POST", "/admin/api/instances/a.ns_1/undrain", raw=b'{"x": 1}'))[0] == 400


# -- the document -----------------------------------------------------------------------------------------


async def test_the_document_describes_every_operation_and_is_served() -> None:
    lab = Lab()
    status, served = await lab.ask("GET", "/admin/api/openapi.json")
    assert status == 200
    assert served == json.loads(json.dumps(api_document()))
    described = {(m.upper(), path) for path, item in served["paths"].items() for m in item}
    declared = {(op.method, op.path) for op in lab.service.router.operations}
    assert declared - described == {("GET", "/admin/api/openapi.json")}
    ids = [told["operationId"] for item in served["paths"].values() for told in item.values()]
    assert len(set(ids)) == len(ids)


async def test_a_fault_of_the_program_is_no_500_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as lab:
        await lab.bus.put(CONFIG, "profile.a", b'{"kind":"profile","name":"a","version":1,"value":1}')
        await eventually(lambda: lab.service.config.get(PROFILE, "a"))
        lab.service.writer._config = None  # type: ignore[assignment]  # a fault, made on purpose
        status, body = await lab.ask("PUT", "/admin/api/tunings/a", {"weight": 1})
        assert (status, body["error"]["code"]) == (503, "internal_error")
        assert "Attribute" not in json.dumps(body)
        assert "the admin API failed" in caplog.text


# -- where a request would go ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "more", "asked"),
    [
        ({}, {}, (Mode.NEUTRAL, Stage.ONLY)),
        ({"disaggregation": {"protocol": "vllm-nixl"}}, {}, (Mode.PD_BATCH, Stage.ONLY)),
        (
            {"disaggregation": {"protocol": "vllm-nixl", "mode": "staged"}},
            {},
            (Mode.PD_STAGED, Stage.PREFILL),
        ),
        ({"disaggregation": {"protocol": "vllm-nixl"}}, {"n": 2}, (Mode.NEUTRAL, Stage.ONLY)),
    ],
)
async def test_where_a_request_would_go_is_asked_as_its_worker_would(
    profile: dict[str, Any], more: dict[str, Any], asked: tuple[Mode, Stage]
) -> None:
    requests: list[ScheduleRequest] = []

    def explain(request: ScheduleRequest) -> ExplainReply:
        requests.append(request)
        event = PlacementEvent(request.decision_id, request.request_id, request.model, "b", "p", "s")
        event = msgspec.structs.replace(event, prefill_candidates=[CandidateTerms("b", 1.0, 0, 0)])
        return ExplainReply("s", (msgspec.json.encode(Explained("same", event)),))

    async with running() as lab:
        await MemoryBus(lab.broker).serve(EXPLAIN_NOW, explain, DEFAULT_SHARD)
        await lab.add(B)
        document = {"profiles": {"default": profile}}
        assert (await lab.ask("PUT", "/admin/api/profiles/n", document))[0] == 201
        body = {"model": "n", "messages": [{"role": "user", "content": "hi"}], **more}
        status, told = await lab.ask("POST", "/admin/api/explain", body)
        assert (status, told["instance"], told["prefill_candidates"][0]["instance"]) == (200, "b", "b")
        pd = {**body, "routing": {"strategy": "pd"}}
        refused = None if profile or more else error(await lab.ask("POST", "/admin/api/explain", pd))
    assert [(request.mode, request.stage) for request in requests] == [asked]
    assert refused in (None, (400, "invalid_strategy", "routing-strategy"))
