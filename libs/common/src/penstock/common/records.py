"""Records that engines' sidecars write to a key-value store, and discovery reads: the format of a value,
and where its key stands.

`penstock` is JSON, `llumnix` the protobuf message of Llumnix's discovery sidecars.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.common.protobuf import read_fields, write_field

PENSTOCK, LLUMNIX = "penstock", "llumnix"
FORMATS = (PENSTOCK, LLUMNIX)

# As large as a record of the registrations bucket may be.
MAX_RECORD_BYTES = 64 * 1024
MAX_INSTANCES = 256
MAX_WEIGHT = 1e6
_MAX_TIMESTAMP_MS = 2**53
_INT32 = range(-(2**31), 2**31)
# What discovery finds out, and a record cannot say.
DERIVED = ("source", "reason", "owners")
RECORDED_STATES = (InstanceState.READY, InstanceState.DRAINING)


class RecordError(Exception):
    """A record that is passed over; the text says why, to a person."""


@dataclass(frozen=True)
class Record:
    """What stands under one key. `timestamp_ms` is when it was written, in ms since 1970 by the writer's
    clock; 0 if it does not say."""

    instances: tuple[Instance, ...]
    timestamp_ms: int = 0


class PenstockRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The value of one key, as JSON. Fields that are not known are passed over."""

    instances: Annotated[tuple[Instance, ...], msgspec.Meta(max_length=MAX_INSTANCES)]
    timestamp_ms: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            le=_MAX_TIMESTAMP_MS,
            description="when it was written, ms since 1970; absent or 0: it does not end by its age",
        ),
    ] = 0


def redis_prefix(record_format: str) -> bytes:
    """What the keys of a format begin with in Redis."""
    return f"{record_format}:discovery:".encode()


def etcd_prefix(record_format: str) -> bytes:
    """What the keys of a format begin with in etcd."""
    return f"{record_format}/discovery/".encode()


def parse_record(key: str, value: bytes, record_format: str) -> Record:
    """What `value`, which stands under `key`, says.

    Raises:
        RecordError: it cannot be used; nothing else is raised, whatever the bytes.
    """
    if len(value) > MAX_RECORD_BYTES:
        raise RecordError(f"it has more than {MAX_RECORD_BYTES} bytes")
    try:
        record = _parse_llumnix(key, value) if record_format == LLUMNIX else _parse_penstock(value)
    except DecodeError as exc:
        raise RecordError(str(exc)) from None
    except ValueError as exc:
        raise RecordError(f"not a Llumnix record ({len(value)} bytes): {exc}") from None
    _check(record)
    return record


def write_record(
    instances: Iterable[Instance], timestamp_ms: int, record_format: str, *, name: str = ""
) -> bytes:
    """The value that says this. `name` is the end of its key; Llumnix's format alone repeats it, as the pod's
    name, and makes ids of it and of the dp ranks. Without it, it is taken from the first id.

    Raises:
        RecordError: the format cannot say it, or nobody would read it.
    """
    instances = tuple(instances)
    if record_format == LLUMNIX:
        value = _write_llumnix(instances, timestamp_ms, name)
    else:
        value = encode_record({"timestamp_ms": timestamp_ms, "instances": [*map(_said, instances)]})
    if len(value) > MAX_RECORD_BYTES:
        raise RecordError(f"it would have {len(value)} bytes, over {MAX_RECORD_BYTES}")
    return value


def _check(record: Record) -> None:
    """What no format may say."""
    seen: set[str] = set()
    for instance in record.instances:
        names = (instance.id, instance.owner, instance.engine, instance.group, instance.kv_address)
        if not instance.id or instance.id in seen:
            raise RecordError("an id is empty, or stands twice")
        seen.add(instance.id)
        # Some become headers and lines of logs; a lone surrogate is not printable either.
        if not all(map(str.isprintable, (*names, *instance.models, *instance.lora_adapters))):
            raise RecordError("an id, a name or an address holds characters that cannot be printed")
        if instance.state not in RECORDED_STATES:
            raise RecordError(f"state {instance.state} is none of {', '.join(RECORDED_STATES)}")
        if not instance.weight <= MAX_WEIGHT:
            raise RecordError(f"a weight is over {MAX_WEIGHT:g}")


def _parse_penstock(value: bytes) -> Record:
    said = decode_record(PenstockRecord, value)
    derived = {name: _UNSAID[name] for name in DERIVED}
    return Record(
        tuple(msgspec.structs.replace(instance, **derived) for instance in said.instances),
        said.timestamp_ms,
    )


_UNSAID = msgspec.structs.asdict(Instance(id="", endpoint=Endpoint("", 1)))


def _said(instance: Instance) -> dict[str, Any]:
    """Without what is derived, and without what is so by default."""
    fields = msgspec.structs.asdict(instance)
    if instance.state not in RECORDED_STATES:
        del fields["state"]
    return {name: value for name, value in fields.items() if name not in DERIVED and value != _UNSAID[name]}


class _LlumnixInstance:
    """InstanceDiscoveryInfo: the fields by number, with proto3's defaults."""

    TYPE, IP, PORT, KV_IP, KV_PORT, DP_RANK, DP_SIZE, MODEL, VERSION = range(1, 10)
    TEXTS = frozenset({TYPE, IP, KV_IP, MODEL})
    INT32S = frozenset({PORT, KV_PORT, DP_RANK, DP_SIZE})


class _LlumnixPod:
    """PodDiscoveryInfo: the fields by number."""

    NAME, TIMESTAMP_MS, INSTANCES = 1, 3, 4


def _parse_llumnix(key: str, value: bytes) -> Record:
    name, timestamp_ms, parts = "", 0, []
    for number, content in read_fields(value):
        if number == _LlumnixPod.NAME:
            name = _text(content)
        elif number == _LlumnixPod.TIMESTAMP_MS:
            timestamp_ms = _number(content)
        elif number == _LlumnixPod.INSTANCES:
            parts.append(_bytes(content))
    if not name or not key.endswith(name):
        raise RecordError("its pod_name is not the end of its key")
    if not 0 < timestamp_ms <= _MAX_TIMESTAMP_MS:
        raise RecordError(f"timestamp_ms is {timestamp_ms}, not a time in ms since 1970")
    if len(parts) > MAX_INSTANCES:
        raise RecordError(f"{len(parts)} instances, over {MAX_INSTANCES}")
    return Record(tuple(_llumnix_instance(name, part) for part in parts), timestamp_ms)


def _llumnix_instance(pod: str, part: bytes) -> Instance:
    info = _LlumnixInstance
    texts = dict.fromkeys(info.TEXTS, "")
    numbers = dict.fromkeys((*info.INT32S, info.VERSION), 0)
    for number, content in read_fields(part):
        if number in texts:
            texts[number] = _text(content)
        elif number in numbers:
            numbers[number] = _number(content)
            if number in info.INT32S and numbers[number] not in _INT32:
                raise ValueError(f"field {number} has more than 32 bits")
    role = texts[info.TYPE]
    if role not in list(Role):
        raise RecordError(f"instance_type {role[:32]!r} is none of {', '.join(Role)}")
    version = numbers[info.VERSION]
    fields = {
        "id": f"{pod}_dp{numbers[info.DP_RANK]}",
        "endpoint": {"host": texts[info.IP], "port": numbers[info.PORT]},
        "models": [texts[info.MODEL]] if texts[info.MODEL] else [],
        "role": role,
        "dp_rank": numbers[info.DP_RANK],
        "dp_size": numbers[info.DP_SIZE] or 1,
        "kv_address": _kv_address(texts[info.KV_IP], numbers[info.KV_PORT]),
        "labels": {"version": str(version)} if version else {},
    }
    # ValidationError, a ValueError, names the field that is out of its bounds.
    return msgspec.convert(fields, Instance)


def _kv_address(host: str, port: int) -> str:
    return str(msgspec.convert({"host": host, "port": port}, Endpoint)) if host and port else ""


def _write_llumnix(instances: tuple[Instance, ...], timestamp_ms: int, name: str) -> bytes:
    if len({instance.dp_rank for instance in instances}) < len(instances):
        raise RecordError(
            "Llumnix's format tells the instances of a record apart by dp rank: two have the same"
        )
    if any(instance.endpoint.scheme != "http" for instance in instances):
        raise RecordError("Llumnix's format cannot say that an instance is reached by https")
    if not name and instances:
        name = instances[0].id.removesuffix(f"_dp{instances[0].dp_rank}")
    return (
        write_field(_LlumnixPod.NAME, name)
        + write_field(_LlumnixPod.TIMESTAMP_MS, timestamp_ms)
        + b"".join(_write_part(instance) for instance in instances)
    )


def _write_part(instance: Instance) -> bytes:
    info = _LlumnixInstance
    kv_host, _, kv_port = instance.kv_address.rpartition(":")
    version = instance.labels.get("version", "")
    fields: list[tuple[int, int | str]] = [
        (info.TYPE, str(instance.role)),
        (info.IP, instance.endpoint.host),
        (info.PORT, instance.endpoint.port),
        (info.KV_IP, kv_host.strip("[]")),
        (info.KV_PORT, int(kv_port) if kv_port.isdecimal() and kv_port.isascii() else 0),
        (info.DP_RANK, instance.dp_rank),
        (info.DP_SIZE, instance.dp_size),
        (info.MODEL, instance.models[0] if instance.models else ""),
        (info.VERSION, int(version) if version.isdecimal() and version.isascii() else 0),
    ]
    part = b"".join(write_field(number, value) for number, value in fields)
    return write_field(_LlumnixPod.INSTANCES, part)


def _text(content: int | bytes) -> str:
    return _bytes(content).decode()


def _bytes(content: int | bytes) -> bytes:
    if isinstance(content, int):
        raise ValueError("a number stands where text is due")
    return content


def _number(content: int | bytes) -> int:
    if isinstance(content, bytes):
        raise ValueError("text stands where a number is due")
    return content
