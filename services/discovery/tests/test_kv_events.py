"""The events of engines on the wire, byte by byte, and whatever else a publisher may send."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.discovery.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventError,
    decode_batch,
    decode_sequence,
)

PARENT = 0xF000000000000001
# [1.5, [{"type": "BlockStored", ...}, {"type": "BlockRemoved", ...}, {"type": "AllBlocksCleared"}], 0], as
# vLLM 0.32 writes it.
VLLM = bytes.fromhex(
    "93cb3ff800000000000093"
    "8b"
    "a474797065" + "ab426c6f636b53746f726564"
    "ac626c6f636b5f686173686573" + "92cff000000000000002cff000000000000003"
    "b1706172656e745f626c6f636b5f68617368" + "cff000000000000001"
    "a9746f6b656e5f696473" + "9401020304"
    "aa626c6f636b5f73697a65" + "02"
    "a76c6f72615f6964" + "c0"
    "a66d656469756d" + "a3475055"
    "a96c6f72615f6e616d65" + "c0"
    "aa65787472615f6b657973" + "92c0c0"
    "a967726f75705f696478" + "00"
    "b26b765f63616368655f737065635f6b696e64" + "ae66756c6c5f617474656e74696f6e"
    "84"
    "a474797065" + "ac426c6f636b52656d6f766564"
    "ac626c6f636b5f686173686573" + "91cff000000000000003"
    "a66d656469756d" + "a3475055"
    "a967726f75705f696478" + "00"
    "81"
    "a474797065" + "b0416c6c426c6f636b73436c6561726564"
    "00"
)
# [1.5, [["BlockStored", [-5], null, [1, 2], 2, null], ["BlockRemoved", [-5]], ["AllBlocksCleared"]]], as
# SGLang writes it.
SGLANG = bytes.fromhex(
    "92cb3ff800000000000093"
    "96" + "ab426c6f636b53746f726564" + "91fb" + "c0" + "920102" + "02" + "c0"
    "92" + "ac426c6f636b52656d6f766564" + "91fb"
    "91" + "b0416c6c426c6f636b73436c6561726564"
)


def test_the_maps_of_a_current_vllm() -> None:
    events, rank = decode_batch(VLLM)
    assert events == [
        BlockStored((PARENT + 1, PARENT + 2), PARENT, (1, 2, 3, 4), 2),
        BlockRemoved((PARENT + 2,)),
        AllBlocksCleared(),
    ]
    assert rank == 0


def test_the_arrays_of_sglang_and_older_releases() -> None:
    events, rank = decode_batch(SGLANG)
    assert events == [BlockStored((-5,), None, (1, 2), 2), BlockRemoved((-5,)), AllBlocksCleared()]
    assert rank is None


def stored(**fields: object) -> bytes:
    event = {
        "type": "BlockStored",
        "block_hashes": [1],
        "parent_block_hash": None,
        "token_ids": [7],
        "block_size": 1,
    }
    return msgspec.msgpack.encode([0.0, [event | fields], None])


def test_hashes_may_be_bytes() -> None:
    (event,), _ = decode_batch(stored(block_hashes=[b"\x01\x02"], parent_block_hash=b"\x03"))
    assert event == BlockStored((b"\x01\x02",), b"\x03", (7,), 1)


@pytest.mark.parametrize(
    ("fields", "adapter", "salt", "whole"),
    [
        ({"extra_keys": [None]}, "", "", True),
        ({"extra_keys": [["s"]]}, "", "s", True),
        ({"extra_keys": [["a"]], "lora_id": 1, "lora_name": "a"}, "a", "", True),
        ({"extra_keys": [["a", "s"]], "lora_id": 1, "lora_name": "a"}, "a", "s", True),
        ({"extra_keys": [["image", "s"]]}, "", "", False),
        ({"extra_keys": [["s"]], "parent_block_hash": 5}, "", "", False),
        ({"extra_keys": ["s"]}, "", "", False),
        ({"lora_id": 3}, "", "", False),
    ],
)
def test_salt_adapter_and_what_tokens_do_not_say(
    fields: dict[str, object], adapter: str, salt: str, whole: bool
) -> None:
    (event,), _ = decode_batch(stored(**fields))
    assert isinstance(event, BlockStored)
    assert (event.adapter, event.salt, event.whole) == (adapter, salt, whole)


@pytest.mark.parametrize("fields", [{"medium": "CPU"}, {"group_idx": 1}, {"type": "BlockMoved"}])
def test_events_that_say_nothing_of_a_prefix_on_the_gpu_are_passed_over(fields: dict[str, object]) -> None:
    assert decode_batch(stored(**fields)) == ([], None)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 5_000,
        msgspec.msgpack.encode({"events": []}),
        msgspec.msgpack.encode([0.0, [[]], None]),
        msgspec.msgpack.encode([0.0, [1], None]),
        stored(token_ids=[7, 8]),
        stored(token_ids=[-1]),
        stored(token_ids=[2**32]),
        stored(block_size=0),
        stored(block_hashes=[1.5]),
        stored(block_hashes=[b"x" * 65]),
        msgspec.msgpack.encode([0.0, [["AllBlocksCleared"]] * 4097, None]),
    ],
)
def test_anything_else_is_refused(payload: bytes) -> None:
    with pytest.raises(KvEventError):
        decode_batch(payload)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_bytes_do_harm(noise: bytes, place: int) -> None:
    for payload in (noise, VLLM[:place] + noise, SGLANG[:place] + noise + SGLANG[place:]):
        try:
            decode_batch(payload)
        except KvEventError:
            continue


@pytest.mark.parametrize("frame", [b"", b"\0" * 7, b"\0" * 9])
def test_a_sequence_number_has_eight_bytes(frame: bytes) -> None:
    assert decode_sequence(bytes(7) + b"\x05") == 5
    with pytest.raises(KvEventError):
        decode_sequence(frame)
