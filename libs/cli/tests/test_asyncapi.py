"""The AsyncAPI document: what AsyncAPI 3.0.0 demands of one, and that its schemas take what writers write."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from penstock.cli.asyncapi import asyncapi_document, events_schema
from penstock.common import routing_events, subjects
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.event_log import EventWriter
from penstock.common.messages import ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.routing_events import PLACEMENT, TYPES, Inputs, PlacementEvent, ViewAge
from penstock.common.subjects import EVENTS, event_subject
from penstock.common.telemetry import Metrics

DOCUMENT: dict[str, Any] = json.loads(json.dumps(asyncapi_document()))
PLACE = re.compile(r"\{([^}]+)\}")


def refs(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for one in part:
            yield from refs(one)


def resolve(ref: str) -> Any:
    found: Any = DOCUMENT
    for name in ref.removeprefix("#/").split("/"):
        found = found[name]
    return found


def test_the_document_has_what_asyncapi_requires() -> None:
    assert re.fullmatch(r"3\.0\.\d+", DOCUMENT["asyncapi"])
    assert {"title", "version"} <= DOCUMENT["info"].keys()
    known = {
        "asyncapi",
        "id",
        "info",
        "servers",
        "defaultContentType",
        "channels",
        "operations",
        "components",
    }
    assert DOCUMENT.keys() <= known
    for server in DOCUMENT["servers"].values():
        assert {"host", "protocol"} <= server.keys()
    assert all(re.fullmatch(r"[\w.\-]+", name) for name in (*DOCUMENT["channels"], *DOCUMENT["operations"]))


def test_every_reference_leads_somewhere() -> None:
    found = list(refs(DOCUMENT))
    assert len(found) > 100
    assert all(resolve(ref) is not None for ref in found)


def test_channels_declare_the_parameters_of_their_addresses_and_no_others() -> None:
    for channel in DOCUMENT["channels"].values():
        assert set(PLACE.findall(channel["address"] or "")) == set(channel.get("parameters", {}))
        assert channel["messages"]
    addresses = [c["address"] for c in DOCUMENT["channels"].values() if c["address"]]
    assert len(addresses) == len(set(addresses))


def test_operations_send_messages_of_their_channel() -> None:
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        for part in (operation, operation.get("reply", operation)):
            channel = part["channel"]["$ref"]
            assert all(one["$ref"].startswith(f"{channel}/messages/") for one in part["messages"])


def test_every_event_type_and_every_subject_has_its_channel() -> None:
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    assert {event_subject(kind, "M").replace("M", "{model}") for kind in TYPES} <= addresses
    heads = [address.split(".{")[0] for address in addresses if address]
    assert all(subject.pattern.split(".*")[0] in heads for subject in subjects.SUBJECTS)
    replies = [one for one in DOCUMENT["operations"].values() if "reply" in one]
    assert len(DOCUMENT["channels"]) == len(TYPES) + len(subjects.SUBJECTS) + len(replies)


def test_the_schemas_are_valid_in_draft_7() -> None:
    jsonschema.Draft7Validator.check_schema(events_schema())
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema.Draft7Validator.check_schema(schema)
        assert "prefixItems" not in json.dumps(schema), name


async def written(kind: str, data: Any) -> Any:
    """What the writer makes of an event, decoded."""
    broker = MemoryBroker()
    bus = MemoryBus(broker)
    await bus.ensure_stream(EVENTS)
    writer = EventWriter(bus, "scheduler/s1", "run1", Metrics())
    writer.emit(kind, "m", "request-1", data)
    running = asyncio.create_task(writer.run(), name="event-log")
    assert await writer.flush(5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return json.loads(broker.streams[EVENTS.name].messages[0].payload)


async def test_the_schema_takes_a_placement_with_all_its_inputs_and_nothing_else() -> None:
    validator = jsonschema.Draft7Validator(events_schema())
    request = ScheduleRequest("d", "r", "m", block_hashes=b"12345678")
    instance = Instance(id="i", endpoint=Endpoint("h", 1))
    inputs = Inputs(
        request,
        "cache-aware",
        1,
        2,
        1,
        numbers={"load": b"\x00" * 8},
        steps=[(1, b"\x01")],
        records=[instance],
        thresholds={"x": 0.5},
    )
    event = PlacementEvent("d", "r", "m", "i", "p", "s", view=ViewAge(), inputs=inputs)
    batch = await written(PLACEMENT, event)
    validator.validate(batch)
    validator.validate(batch[0])
    for field, value in (("id", ""), ("specversion", "0.3"), ("type", "penstock.outcome.v1"), ("more", 1)):
        assert not validator.is_valid([batch[0] | {field: value}]), field
    assert not validator.is_valid([])
    without = {name: value for name, value in batch[0]["data"].items() if name != "decision_id"}
    assert not validator.is_valid([batch[0] | {"data": without}])


@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_is_named_once_and_has_a_docstring(kind: str) -> None:
    assert DOCUMENT["components"]["messages"][kind]["summary"]
    assert DOCUMENT["channels"][kind]["summary"]
    assert [name for name, value in vars(routing_events).items() if value == kind and name.isupper()]
