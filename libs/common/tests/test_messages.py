"""Every message of the wire crosses it unchanged, and nothing else gets in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect as types

from penstock.common import messages
from penstock.common.codec import DecodeError, decode, decode_record, encode, encode_record
from penstock.common.messages import CompleteMarker, ScheduleBatch, ScheduleRequest
from penstock.common.model import Instance
from penstock.common.subjects import DISCOVER, EXPLAIN, SCHEDULE, SNAPSHOT, SUBJECTS

Kind = type[msgspec.Struct]

# CompleteMarker is a record of a bucket; the parts of other messages cross the wire inside them.
ON_THE_WIRE: tuple[Kind, ...] = (
    *(subject.message for subject in SUBJECTS),
    SCHEDULE.reply,
    SNAPSHOT.reply,
    DISCOVER.reply,
    EXPLAIN.reply,
)
RECORDS: tuple[Kind, ...] = (Instance, CompleteMarker)


def arbitrary(kind: types.Type) -> st.SearchStrategy[Any]:
    """Values of a type as msgspec sees it, within its bounds; collections short."""
    match kind:
        case types.StrType(pattern=str() as pattern):
            return st.from_regex(pattern)
        case types.StrType(max_length=longest):
            return st.text(max_size=min(longest or 20, 20))
        case types.BytesType(max_length=longest):
            return st.binary(max_size=min(longest or 64, 64))
        case types.IntType(ge=least, le=most):
            return st.integers(-(2**63) if least is None else least, 2**63 - 1 if most is None else most)
        case types.FloatType(ge=least, le=most, gt=above):
            return st.floats(
                above if least is None else least, most, allow_nan=False, allow_infinity=False,
                exclude_min=above is not None,
            )  # fmt: skip
        case types.BoolType():
            return st.booleans()
        case types.NoneType():
            return st.none()
        case types.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case types.VarTupleType(item_type=item, min_length=least):
            return st.lists(arbitrary(item), min_size=least or 0, max_size=3).map(tuple)
        case types.DictType(key_type=key, value_type=value):
            return st.dictionaries(arbitrary(key), arbitrary(value), max_size=3)
        case types.UnionType(types=options):
            return st.one_of(*map(arbitrary, options))
        case types.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: arbitrary(field.type) for field in fields})
    raise AssertionError(f"no strategy for {kind}")


def parts(kind: types.Type, path: str = "") -> Iterator[tuple[str, types.Type]]:
    """The type and all types within it, each with where it stands."""
    yield path, kind
    match kind:
        case types.StructType(cls=cls, fields=fields):
            for field in fields:
                yield from parts(field.type, f"{path or cls.__name__}.{field.name}")
        case types.VarTupleType(item_type=item):
            yield from parts(item, f"{path}[]")
        case types.UnionType(types=options):
            for option in options:
                yield from parts(option, path)
        case types.DictType(key_type=key, value_type=value):
            yield from parts(key, f"{path}{{key}}")
            yield from parts(value, f"{path}{{value}}")


def name_of(kind: Kind) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", ON_THE_WIRE, ids=name_of)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_message_is_decoded_as_it_was_encoded(kind: Kind, data: st.DataObject) -> None:
    message = data.draw(arbitrary(types.type_info(kind)))
    assert decode(kind, encode(message)) == message


@pytest.mark.parametrize("kind", RECORDS, ids=name_of)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_record_is_decoded_as_it_was_encoded(kind: Kind, data: st.DataObject) -> None:
    record = data.draw(arbitrary(types.type_info(kind)))
    assert decode_record(kind, encode_record(record)) == record


def test_every_message_struct_is_on_the_wire_or_part_of_one_that_is() -> None:
    declared = {
        kind
        for _, kind in inspect.getmembers(messages, inspect.isclass)
        if issubclass(kind, msgspec.Struct) and kind.__module__ == messages.__name__
    }
    reached = {
        part.cls
        for kind in (*ON_THE_WIRE, *RECORDS)
        for _, part in parts(types.type_info(kind))
        if isinstance(part, types.StructType)
    }
    assert declared - reached == set()


@pytest.mark.parametrize("kind", [*ON_THE_WIRE, *RECORDS], ids=name_of)
def test_required_fields_come_first_and_nothing_can_be_changed(kind: Kind) -> None:
    assert kind.__struct_config__.frozen
    required = [field.required for field in msgspec.structs.fields(kind)]
    assert required == sorted(required, reverse=True)


@pytest.mark.parametrize("kind", ON_THE_WIRE, ids=name_of)
def test_whatever_can_grow_has_a_bound_and_no_number_can_be_infinite(kind: Kind) -> None:
    for where, part in parts(types.type_info(kind)):
        match part:
            case types.StrType() | types.BytesType() | types.VarTupleType():
                assert part.max_length is not None, where
            case types.FloatType():
                # A comparison with NaN is false, so a bound on either side keeps it out.
                assert part.ge is not None, where
                assert part.le is not None, where
            case types.DictType():
                raise AssertionError(f"{where} has no bound")


@pytest.mark.parametrize("kind", ON_THE_WIRE, ids=name_of)
@settings(max_examples=150, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_a_message_or_a_decode_error(kind: Kind, garbage: bytes) -> None:
    try:
        assert isinstance(decode(kind, garbage), kind)
    except DecodeError:
        return


@pytest.mark.parametrize("kind", ON_THE_WIRE, ids=name_of)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_message_is_a_message_or_a_decode_error(kind: Kind, data: st.DataObject) -> None:
    encoded = bytearray(encode(data.draw(arbitrary(types.type_info(kind)))))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    try:
        assert isinstance(decode(kind, bytes(encoded[:cut])), kind)
    except DecodeError:
        return


@pytest.mark.parametrize("kind", RECORDS, ids=name_of)
@settings(max_examples=150, deadline=None)
@given(garbage=st.binary(max_size=200) | st.text().map(lambda text: text.encode()))
def test_a_garbage_record_is_a_decode_error(kind: Kind, garbage: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_record(kind, garbage)


BATCH = ScheduleBatch("i", "r", 50.0, (ScheduleRequest("d", "r", "m"),))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"budget_ms": -1.0}, "a negative budget"),
        ({"budget_ms": float("nan")}, "a budget that is no number"),
        ({"budget_ms": float("inf")}, "an endless budget"),
        ({"requests": ()}, "an empty batch"),
        ({"requests": BATCH.requests * 33}, "a batch over its bound"),
        ({"ingress": "x" * 129}, "a name over its bound"),
    ],
)
def test_a_batch_out_of_bounds_is_not_decoded(change: dict[str, Any], why: str) -> None:
    with pytest.raises(DecodeError):
        decode(ScheduleBatch, encode(msgspec.structs.replace(BATCH, **change)))


def test_prompt_hashes_over_the_bound_are_not_decoded() -> None:
    request = ScheduleRequest("d", "r", "m", block_hashes=b"x" * (8 * messages.MAX_BLOCKS + 1))
    with pytest.raises(DecodeError):
        decode(ScheduleBatch, encode(msgspec.structs.replace(BATCH, requests=(request,))))
