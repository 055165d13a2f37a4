"""What happens to the blocks of an engine's prefix cache, and how engines put it into words on the wire.

`vllm` is maps with unsigned hashes (0.32), `vllm-bytes` arrays with
hashes as bytes (older releases), `sglang` arrays with signed hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

from penstock.sim import text
from penstock.sim.spec import EngineRequest

KvEncoding = Literal["vllm", "vllm-bytes", "sglang"]
ENCODINGS: tuple[KvEncoding, ...] = get_args(KvEncoding)


class Stored(msgspec.Struct, frozen=True):
    """A run of blocks: the first follows `parent`, None at the beginning of a prompt. `root` is the LoRA
    adapter and the cache salt, with a line break between, or empty."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: bytes
    root: str


class Removed(msgspec.Struct, frozen=True):
    """An evicted block."""

    block_hash: int


class Cleared(msgspec.Struct, frozen=True):
    """The cache was emptied."""


class KvLog:
    """Events since the last `take`; an engine without a publisher has none of it."""

    def __init__(self, block_size: int) -> None:
        self._width = block_size * text.TOKEN_BYTES
        self._events: list[Stored | Removed | Cleared] = []

    def stored(self, request: EngineRequest, place: int) -> None:
        """Block number `place` of a request is in the cache from here on."""
        hashes, width = request.block_hashes, self._width
        last = self._events[-1] if self._events else None
        parent = hashes[place - 1] if place else None
        tokens = request.tokens[place * width : (place + 1) * width]
        if isinstance(last, Stored) and parent is not None and last.hashes[-1] == parent:
            self._events[-1] = Stored(
                (*last.hashes, hashes[place]), last.parent, last.tokens + tokens, last.root
            )
        else:
            self._events.append(Stored((hashes[place],), parent, tokens, request.cache_root))

    def removed(self, block_hash: int) -> None:
        """A block was evicted."""
        self._events.append(Removed(block_hash))

    def cleared(self) -> None:
        """The cache was emptied."""
        self._events.append(Cleared())

    def take(self) -> list[Stored | Removed | Cleared]:
        """The events since the last call, in their order."""
        events, self._events = self._events, []
        return events


def encode(
    events: Sequence[Stored | Removed | Cleared], encoding: KvEncoding, block_size: int, timestamp: float
) -> bytes:
    """The payload of one message."""
    shown = [_event(event, encoding, block_size) for event in events]
    batch: list[Any] = [timestamp, shown]
    if encoding != "sglang":
        batch.append(None)
    return msgspec.msgpack.encode(batch)


def _event(event: Stored | Removed | Cleared, encoding: KvEncoding, block_size: int) -> Any:
    fields: dict[str, Any]
    if isinstance(event, Cleared):
        kind, fields = "AllBlocksCleared", {}
    elif isinstance(event, Removed):
        kind, fields = "BlockRemoved", {"block_hashes": [_hash(event.block_hash, encoding)], "medium": "GPU"}
    else:
        kind, fields = "BlockStored", _stored(event, encoding, block_size)
    if encoding == "vllm":
        if fields:
            fields["group_idx"] = 0
        if kind == "BlockStored":
            fields["kv_cache_spec_kind"] = "full_attention"
        return {"type": kind, **fields}
    if encoding == "sglang":
        fields.pop("medium", None)
    return [kind, *fields.values()]


def _stored(event: Stored, encoding: KvEncoding, block_size: int) -> dict[str, Any]:
    adapter, _, salt = event.root.partition("\n")
    fields: dict[str, Any] = {
        "block_hashes": [_hash(one, encoding) for one in event.hashes],
        "parent_block_hash": None if event.parent is None else _hash(event.parent, encoding),
        "token_ids": text.token_ids(event.tokens),
        "block_size": block_size,
        "lora_id": 1 if adapter else None,
    }
    if encoding == "sglang":
        return fields
    extra: list[list[str] | None] = [[adapter] if adapter else None for _ in event.hashes]
    if salt and event.parent is None:
        extra[0] = [*(extra[0] or []), salt]
    return fields | {"medium": "GPU", "lora_name": adapter or None, "extra_keys": extra}


def _hash(block_hash: int, encoding: KvEncoding) -> int | bytes:
    if encoding == "vllm-bytes":
        return block_hash.to_bytes(8, "big")
    if encoding == "sglang" and block_hash >= 2**63:
        return block_hash - 2**64
    return block_hash
