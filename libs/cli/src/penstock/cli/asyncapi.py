"""The AsyncAPI 3 document of the bus: the routing events as CloudEvents, and what the services say among
themselves. Made from the declarations that the code runs on.

Schemas are JSON Schema draft 7, which every AsyncAPI tool reads: AsyncAPI 3.0.0, "Schema Object".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from penstock.cli.event_lines import BATCH_TYPE
from penstock.common import subjects
from penstock.common.event_batches import INCARNATION, PREVIOUS, SEQUENCE, WRITER
from penstock.common.routing_events import TYPES, type_of
from penstock.common.subjects import EVENTS, event_subject

ASYNCAPI, VERSION = "3.0.0", "1"
DRAFT = "http://json-schema.org/draft-07/schema#"
MSGPACK = "application/msgpack"
_SPACE = re.compile(r"\s+")
Json = dict[str, Any]

# CloudEvents 1.0, "Required Attributes" and "Optional Attributes", as far as these events have them.
ATTRIBUTES: Json = {
    "specversion": {"const": "1.0"},
    "id": {
        "type": "string",
        "minLength": 1,
        "description": "writer, incarnation and number, or for an outcome `lost` the request's last "
        "decision; with `source` unique for good, and the same when an event is stored more than once or "
        "told by several witnesses: de-duplicate by both",
    },
    "source": {"type": "string", "format": "uri-reference", "minLength": 1, "description": "who it is about"},
    "type": {"type": "string", "description": "kind and version"},
    "subject": {
        "type": "string",
        "description": "the request's id; the instance's, service's or target's where there is no request",
    },
    "time": {"type": "string", "format": "date-time", "description": "when it happened, UTC"},
}
HEADERS: Json = {
    "type": "object",
    "required": ["Nats-Msg-Id", "content-type", WRITER, INCARNATION, SEQUENCE, PREVIOUS],
    "properties": {
        "Nats-Msg-Id": {"type": "string", "description": "the same when a message is sent again"},
        "content-type": {"const": BATCH_TYPE},
        WRITER: {"type": "string", "description": "service and id of the process that wrote it"},
        INCARNATION: {"type": "string", "description": "which run of that process"},
        SEQUENCE: {
            "type": "string",
            "pattern": "^[1-9][0-9]*-[1-9][0-9]*$",
            "description": "first and last number of its events; a jump between two messages is a gap",
        },
        PREVIOUS: {
            "type": "string",
            "pattern": "^([0-9a-f]{64})?$",
            "description": "SHA-256 of the writer's message before it; empty in the first one",
        },
    },
}


def asyncapi_document() -> Json:
    """The whole document, in plain JSON types."""
    replies = {s.request.pattern: s.reply for s in vars(subjects).values() if isinstance(s, subjects.Service)}
    kinds = {one.message for one in subjects.SUBJECTS} | set(replies.values())
    structs = [*TYPES.values(), *sorted(kinds, key=lambda kind: kind.__name__)]
    _, data = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    channels: Json = {kind: _event_channel(kind) for kind in TYPES}
    operations: Json = {f"tell{kind.title()}": _send(kind) for kind in TYPES}
    messages: Json = {kind: _event_message(kind) for kind in TYPES}
    for subject in subjects.SUBJECTS:
        name, reply = _name(subject.pattern), replies.get(subject.pattern)
        channels[name], operations[f"send-{name}"] = _channel(subject), _send(name)
        messages[name] = _message(subject.message)
        if reply is not None:
            answer = f"{name}-reply"
            channels[answer] = {"address": None, "messages": {answer: _to("messages", answer)}}
            messages[answer] = _message(reply)
            operations[f"send-{name}"]["reply"] = {
                "address": {"location": "$message.header#/replyTo"},
                "channel": _channel_ref(answer),
                "messages": [_message_ref(answer)],
            }
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "Penstock bus",
            "version": VERSION,
            "description": "Routing events, for auditors to subscribe to, are CloudEvents 1.0 in JetStream's "
            f"stream `{EVENTS.name}`. On the other channels services talk among themselves, in MessagePack.",
        },
        "defaultContentType": BATCH_TYPE,
        "servers": {"bus": {"host": "127.0.0.1:4222", "protocol": "nats", "description": "--nats-url"}},
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": draft_7({"CloudEvent": _envelope(), **event_schemas(), **data}),
        },
    }


def event_schemas() -> Json:
    """The schema of one event of each kind, by kind."""
    return {
        kind: {
            "title": f"{kind} event",
            "allOf": [
                {"$ref": "#/components/schemas/CloudEvent"},
                {
                    "properties": {
                        "type": {"const": type_of(kind)},
                        "data": {"$ref": f"#/components/schemas/{cls.__name__}"},
                    }
                },
            ],
        }
        for kind, cls in TYPES.items()
    }


def events_schema() -> Json:
    """One JSON Schema that takes what a message of the log holds: an event, or an array of them."""
    _, data = msgspec.json.schema_components(list(TYPES.values()), ref_template="#/components/schemas/{name}")
    kinds = [{"$ref": f"#/components/schemas/{kind}"} for kind in TYPES]
    schema = {
        "$schema": DRAFT,
        "$comment": "written by `make docs`",
        "title": "Penstock routing events",
        "oneOf": [
            {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/event"}},
            {"$ref": "#/components/schemas/event"},
        ],
        "components": {
            "schemas": {"event": {"oneOf": kinds}, "CloudEvent": _envelope(), **event_schemas(), **data}
        },
    }
    return {name: draft_7(part) if name == "components" else part for name, part in schema.items()}


def draft_7(schema: Any) -> Any:
    """What msgspec writes in draft 2020-12 (arrays with a schema for each place), in draft 7."""
    if isinstance(schema, Mapping):
        plain = {name: draft_7(part) for name, part in schema.items()}
        if isinstance(plain.get("description"), str):
            plain["description"] = _SPACE.sub(" ", plain["description"]).strip()
        if isinstance(plain.get("prefixItems"), list):
            rest = plain.pop("items", True)
            plain["items"], plain["additionalItems"] = plain.pop("prefixItems"), rest
        return plain
    return [draft_7(part) for part in schema] if isinstance(schema, list | tuple) else schema


def _envelope() -> Json:
    required = ["specversion", "id", "source", "type", "subject", "time", "data"]
    return {
        "title": "CloudEvent",
        "type": "object",
        "required": required,
        "properties": {**ATTRIBUTES, "data": {"type": "object"}},
        "additionalProperties": False,
    }


def _event_channel(kind: str) -> Json:
    return {
        "address": event_subject(kind, "MODEL").replace("MODEL", "{model}"),
        "title": f"{kind} events",
        "summary": _prose(TYPES[kind]),
        "parameters": {
            "model": {
                "description": "the model as one token: every byte but letters, digits, _ and - as =XX; "
                "- for none. Subscribe with * for all models"
            }
        },
        "messages": {kind: _to("messages", kind)},
    }


def _event_message(kind: str) -> Json:
    one = {"$ref": f"#/components/schemas/{kind}"}
    return {
        "title": f"{kind} events",
        "summary": f"Events of the type {type_of(kind)}, of one model",
        "contentType": BATCH_TYPE,
        "headers": HEADERS,
        "payload": {"oneOf": [{"type": "array", "minItems": 1, "items": one}, one]},
    }


def _channel(subject: subjects.Subject[Any]) -> Json:
    name, stars = _name(subject.pattern), subject.pattern.count("*")
    tokens = [f"token{number}" for number in range(1, stars + 1)]
    address = subject.pattern.split(".*", 1)[0]
    channel: Json = {
        "address": ".".join((address, *(f"{{{one}}}" for one in tokens))),
        "messages": {name: _to("messages", name)},
    }
    if tokens:
        channel["parameters"] = {one: {"description": "shard, process or instance"} for one in tokens}
    return channel


def _message(cls: type[msgspec.Struct]) -> Json:
    ref = {"$ref": f"#/components/schemas/{cls.__name__}"}
    return {"title": cls.__name__, "summary": _prose(cls), "contentType": MSGPACK, "payload": ref}


def _send(name: str) -> Json:
    return {"action": "send", "channel": _channel_ref(name), "messages": [_message_ref(name)]}


def _channel_ref(name: str) -> Json:
    return {"$ref": f"#/channels/{name}"}


def _message_ref(name: str) -> Json:
    return {"$ref": f"#/channels/{name}/messages/{name}"}


def _to(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _name(pattern: str) -> str:
    """The subject `schedule.*.*` of a version as `schedule-2`: names hold no dots or stars."""
    parts = pattern.split(".")[2:]
    words: Iterable[str] = [part for part in parts if part != "*"]
    stars = parts.count("*")
    return "-".join([*words, str(stars)] if stars > 1 else words)


def _prose(cls: type[msgspec.Struct]) -> str:
    return _SPACE.sub(" ", cls.__doc__ or "").strip()
