"""`python -m penstock.cli.docs`: what is written out of the code: docs/reference, and the users of NATS."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import inspect as types
from pydantic import Field

from penstock.cli import event_lines, metric_families
from penstock.cli.asyncapi import asyncapi_document, events_schema
from penstock.cli.audit.settings import ExportSettings, VerifySettings
from penstock.cli.explain import ExplainSettings
from penstock.cli.nats_accounts import accounts_config
from penstock.cli.replay.settings import ReplaySettings
from penstock.cli.tap import TapSettings
from penstock.cli.top.__main__ import TopSettings
from penstock.cli.up_settings import SERVICES, UpSettings
from penstock.common import (
    event_batches,
    instances,
    live_config,
    messages,
    model,
    permissions,
    records,
    routing_events,
    subjects,
    telemetry,
)
from penstock.common.settings import ServiceSettings, Settings, describe, load_or_exit
from penstock.common.settings_sources import flag_of
from penstock.discovery.register.settings import RegisterSettings
from penstock.discovery.settings import DiscoverySettings
from penstock.ingress.admin.service import API_VERSION, api_document
from penstock.ingress.public_api import public_document
from penstock.sim.settings import SimSettings

TABLES = "docs/reference"
NATS_ACCOUNTS = "deploy/k8s/base/nats/accounts.conf"
GENERATED = "<!-- written by `make docs`; change the code that it describes -->\n"
RECORDS: dict[str, dict[str, type[msgspec.Struct]]] = {
    subjects.INSTANCES.name: {
        f"{instances.INSTANCE_PREFIX}<instance>": model.Instance,
        f"{instances.COMPLETE_PREFIX}<source>": messages.CompleteMarker,
    },
    subjects.REGISTRATIONS.name: {"<name>": records.PenstockRecord},
    subjects.CONFIG.name: {"<kind>.<name>": live_config.ConfigRecord},
}


class DocsSettings(Settings):
    """Write the generated tables of the documentation."""

    check: bool = Field(False, description="write nothing; exit code 1 if a file differs")
    folder: Path = Field(Path("."), description="root of the tree that the files are in")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; with `--check`, compare them."""
    settings = load_or_exit(DocsSettings, argv, prog="python -m penstock.cli.docs")
    stale = [
        settings.folder / name
        for name, text in pages().items()
        if not _holds(settings.folder / name, text, write=not settings.check)
    ]
    for path in stale:
        print(f"{path} is out of step with the code: run make docs", file=sys.stderr)
    return 1 if stale else 0


def pages() -> dict[str, str]:
    """Path in the tree to content."""
    tables = {
        f"{TABLES}/{name}": "\n".join([GENERATED, *lines, ""])
        for name, lines in (
            ("flags.md", _flags()),
            ("bus.md", _bus()),
            ("events.md", _events()),
            ("metrics.md", _metrics()),
        )
    }
    others = {
        "asyncapi.yaml": _api(asyncapi_document()),
        "events.schema.json": json.dumps(events_schema(), indent=1) + "\n",
        "record.schema.json": _record_schema(),
        "openapi-admin.yaml": _api(api_document()),
        "openapi.yaml": _api(public_document(API_VERSION)),
    }
    tables |= {f"{TABLES}/{name}": text for name, text in others.items()}
    return tables | {NATS_ACCOUNTS: accounts_config()}


def _record_schema() -> str:
    """What a record in a key-value store may say: of an instance, all but what discovery finds out."""
    schema = msgspec.json.schema(records.PenstockRecord)
    instance: dict[str, Any] = schema["$defs"]["Instance"]["properties"]
    for name in records.DERIVED:
        del instance[name]
    instance["state"] = {"enum": [*records.RECORDED_STATES], "default": model.InstanceState.READY}
    instance["weight"]["maximum"] = records.MAX_WEIGHT
    schema = {"$comment": "written by `make docs`", "title": "Penstock record", **schema}
    return json.dumps(schema, indent=2) + "\n"


def _api(document: dict[str, Any]) -> str:
    """An OpenAPI or AsyncAPI document for people."""
    # By way of JSON: YAML would mark what several places share.
    plain = json.loads(json.dumps(document))
    return "# written by `make docs`\n" + yaml.safe_dump(plain, sort_keys=False, width=110)


def _holds(path: Path, text: str, write: bool) -> bool:
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _prose(kind: object) -> str:
    return " ".join((kind.__doc__ or "").split())


def _flags() -> Iterator[str]:
    yield "# Flags\n"
    yield "Each flag is also an environment variable and, without the dashes, a key of the YAML file that"
    yield "`--config` names. A flag beats the environment, which beats the file.\n"
    yield from _flag_section("Every service", ServiceSettings, ServiceSettings.model_fields.keys())
    for name, cls in SERVICES.items():
        yield from _flag_section(f"penstock {name}", cls, _own(cls))
    yield from _flag_section("penstock register", RegisterSettings, _of_sidecar())
    yield "Also the flags of every service, and of `penstock discovery` those that begin with"
    yield "`--discovery-redis-`, `--discovery-etcd-`, `--discovery-nats-` and `--discovery-record-`.\n"
    yield from _flag_section("penstock up", UpSettings, _declared(UpSettings))
    yield "Also every flag of every service, and those of `penstock sim` with `--sim-` before their name.\n"
    yield from _flag_section("penstock sim", SimSettings, _own(SimSettings))
    yield from _flag_section("penstock replay", ReplaySettings, _own(ReplaySettings))
    yield from _flag_section("penstock tap", TapSettings, _own(TapSettings))
    yield from _flag_section("penstock top", TopSettings, _own(TopSettings))
    yield from _flag_section("penstock audit verify", VerifySettings, _own(VerifySettings))
    yield from _flag_section("penstock audit export", ExportSettings, _own(ExportSettings))
    yield from _flag_section("penstock explain REQUEST_ID", ExplainSettings, _own(ExplainSettings))
    yield "Also the `--nats-` flags of every service."


def _declared(cls: type[Settings]) -> set[str]:
    return cls.__annotations__.keys() & cls.model_fields.keys()


def _own(cls: type[Settings]) -> set[str]:
    """What `cls` declares or takes from parts of its own, and not what every service has."""
    return _declared(cls) | (cls.model_fields.keys() - ServiceSettings.model_fields.keys())


def _of_sidecar() -> set[str]:
    return _declared(RegisterSettings) | (_own(RegisterSettings) - DiscoverySettings.model_fields.keys())


def _flag_section(title: str, cls: type[Settings], fields: Any) -> Iterator[str]:
    wanted = {flag_of(name) for name in fields}
    rows = (
        (_code(flag), _code(variable), _code(default), text)
        for flag, variable, default, text in describe(cls)
        if flag in wanted
    )
    yield f"## {title}\n"
    if cls is not ServiceSettings:
        yield f"{_prose(cls)}\n"
    yield from _table(("flag", "variable", "default", "meaning"), rows)


def _bus() -> Iterator[str]:
    replies = {s.request.pattern: s.reply for s in vars(subjects).values() if isinstance(s, subjects.Service)}
    structs: dict[str, type[msgspec.Struct]] = {}

    def link(kind: type[msgspec.Struct] | None) -> str:
        return _link(structs, kind) if kind else ""

    yield "# The bus\n"
    yield "## Subjects\n"
    heads = ("subject", "message", "reply", "queue group", "bytes at most", "waiting at most")
    rows = (
        (
            _code(s.pattern),
            link(s.message),
            link(replies.get(s.pattern)),
            _code(s.queue_group),
            f"{s.max_bytes:,}",
            f"{s.pending_messages:,}",
        )
        for s in subjects.SUBJECTS
    )
    yield from _table(heads, rows)
    yield "Messages are MessagePack. More waiting ones than that are dropped and counted.\n"
    yield from _stores(structs)
    yield from _users()
    yield "## Messages and records\n"
    yield "What is an array takes further fields at its end only; what is none takes them anywhere.\n"
    yield from _struct_sections(structs)


def _stores(structs: dict[str, type[msgspec.Struct]]) -> Iterator[str]:
    yield "## Buckets\n"
    yield "Key-value buckets with file storage and history 1; records are JSON.\n"
    rows = (
        (_code(b.name), _code(key), _link(structs, kind), f"{b.max_value_bytes:,}", f"{b.max_bytes:,}")
        for b in subjects.BUCKETS
        for key, kind in RECORDS[b.name].items()
    )
    yield from _table(("bucket", "key", "record", "bytes of a record at most", "bytes at most"), rows)
    yield "## Streams\n"
    yield "At either bound the oldest messages go. Content: [events](events.md), and copies of requests.\n"
    streams = (
        (
            _code(s.name),
            ", ".join(map(_code, s.subjects)),
            f"{s.max_message_bytes:,}",
            f"{s.max_bytes:,}",
            f"{s.max_age_s / 86400:g} days" if s.max_age_s >= 86400 else f"{s.max_age_s:g} s",
            s.storage,
        )
        for s in subjects.STREAMS
    )
    yield from _table(
        ("stream", "subjects", "bytes of a message at most", "bytes at most", "age at most", "kept in"),
        streams,
    )
    yield "## Counters\n"
    yield "Numbers that are added to (NATS's message counters), in memory; at either bound the oldest go.\n"
    counters = (
        (_code(c.name), _code(c.subject(">")), f"{c.max_bytes:,}", f"{c.max_age_s:g} s")
        for c in subjects.COUNTERS
    )
    yield from _table(("stream", "subjects", "bytes at most", "age at most"), counters)


def _users() -> Iterator[str]:
    grants = permissions.GRANTS
    granted = sorted({s for grant in grants.values() for s in (*grant.publish, *grant.subscribe)})

    def who(kind: str, subject: str) -> str:
        return ", ".join(_code(user) for user, grant in grants.items() if subject in getattr(grant, kind))

    yield "## Users\n"
    yield "What the users of `penstock up` may do, and nothing else ([guide](../guide/bus-security.md))."
    yield "A subject followed by a name is subscribed to as a member of that queue group only.\n"
    rows = ((_code(s), who("publish", s), who("subscribe", s)) for s in granted)
    yield from _table(("subject", "may publish", "may subscribe"), rows)


def _events() -> Iterator[str]:
    yield "# Routing events\n"
    yield f"{_prose(routing_events)}\n"
    single, batch = event_lines.SINGLE_TYPE, event_batches.BATCH_TYPE
    yield f"Events are CloudEvents 1.0 in JSON, in the stream `{subjects.EVENTS.name}`. A message holds one"
    yield f"event (`content-type: {single}`) or an array of them (`{batch}`) of the"
    yield "same type and model. Its headers:\n"
    headers = (
        (event_batches.WRITER, "service and id of the process that wrote it"),
        (event_batches.INCARNATION, "which run of that process"),
        (event_batches.SEQUENCE, "`first-last`: numbers of its events; a jump between two messages is a gap"),
        (
            event_batches.PREVIOUS,
            "SHA-256 over the hash and the payload of the writer's message before it",
        ),
    )
    yield from _table(("header", "meaning"), ((_code(name), text) for name, text in headers))
    yield "Fields that hold their default are left out.\n"
    structs: dict[str, type[msgspec.Struct]] = {}
    for kind, cls in routing_events.TYPES.items():
        yield f"## {kind}\n"
        pattern = subjects.event_subject(kind, "MODEL").replace("MODEL", "<model>")
        yield f"Type `{routing_events.type_of(kind)}` on `{pattern}`. {_prose(cls)}\n"
        yield from _fields(cls, structs)
    yield from _struct_sections(structs)


def _metrics() -> Iterator[str]:
    yield "# Metrics\n"
    yield "What `/metrics` of the admin listeners gives, in Prometheus's text format. An ingress's are those"
    yield "of all its workers: counters, histograms and amounts added up, of ages and states the worst. Of a"
    yield f"metric at most {telemetry.MAX_CELLS:,} combinations of label values are kept; what comes on top"
    yield f"counts as `{telemetry.OVERFLOW}`. How to read them: [observability](../guide/observability.md).\n"
    rows = (
        (
            _code(family.name),
            family.kind,
            _unit(family),
            ", ".join(map(_code, family.label_names)),
            ", ".join(services),
            family.help,
        )
        for family, services in metric_families.families().values()
    )
    yield from _table(("name", "type", "unit", "labels", "services", "meaning"), rows)


def _unit(family: telemetry.FamilySnapshot) -> str:
    if family.help.startswith("1 "):
        return "0 or 1"
    last = family.name.removesuffix("_total").rsplit("_", 1)[1]
    return last if last in ("seconds", "bytes", "ratio", "tokens", "blocks", "requests") else ""


def _link(structs: dict[str, type[msgspec.Struct]], kind: type[msgspec.Struct]) -> str:
    structs.setdefault(kind.__name__, kind)
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _struct_sections(structs: dict[str, type[msgspec.Struct]]) -> Iterator[str]:
    """A section for each, and for those that their fields name in turn."""
    done: set[str] = set()
    while names := [name for name in structs if name not in done]:
        yield f"### {names[0]}\n"
        yield f"{_prose(structs[names[0]])}{_as_array(structs[names[0]])}\n"
        yield from _fields(structs[names[0]], structs)
        done.add(names[0])


def _as_array(cls: type[msgspec.Struct]) -> str:
    config = cls.__struct_config__
    tag = f", after the word `{config.tag}`" if config.tag is not None else ""
    return f" An array of these fields{tag}." if config.array_like else ""


def _fields(cls: type[msgspec.Struct], structs: dict[str, type[msgspec.Struct]]) -> Iterator[str]:
    info = types.type_info(cls)
    assert isinstance(info, types.StructType)
    rows = ((_code(f.encode_name), _type(f.type, structs), _default(f)) for f in info.fields)
    yield from _table(("field", "type", "default"), rows)


def _default(field: types.Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        return _code(msgspec.json.encode(field.default_factory()).decode())
    return _code(msgspec.json.encode(field.default).decode())


def _type(kind: types.Type, structs: dict[str, type[msgspec.Struct]]) -> str:
    match kind:
        case types.Metadata():
            return _type(kind.type, structs)
        case types.StrType() | types.BytesType():
            name = "string" if isinstance(kind, types.StrType) else "bytes"
            return f"{name}, {kind.max_length:,} at most" if kind.max_length is not None else name
        case types.IntType() | types.FloatType():
            return _number(kind)
        case types.BoolType():
            return "boolean"
        case types.NoneType():
            return "null"
        case types.AnyType():
            return "any JSON"
        case types.EnumType():
            return ", ".join(_code(str(member.value)) for member in kind.cls)
        case types.StructType():
            return _link(structs, kind.cls)
        case types.UnionType():
            return " or ".join(_type(part, structs) for part in kind.types)
        case types.CollectionType():
            bound = f", {kind.max_length:,} at most" if kind.max_length is not None else ""
            return f"list of ({_type(kind.item_type, structs)}){bound}"
        case types.TupleType():
            return f"array of {' and '.join(_type(part, structs) for part in kind.item_types)}"
        case types.DictType():
            return f"map of ({_type(kind.key_type, structs)}) to ({_type(kind.value_type, structs)})"
    raise TypeError(f"no words for {kind}")


def _number(kind: types.IntType | types.FloatType) -> str:
    name = "integer" if isinstance(kind, types.IntType) else "number"
    bounds = ((kind.ge, "from {:,}"), (kind.gt, "above {:,}"), (kind.le, "to {:,}"), (kind.lt, "below {:,}"))
    return " ".join([name, *(text.format(bound) for bound, text in bounds if bound is not None)])


if __name__ == "__main__":
    sys.exit(main())
