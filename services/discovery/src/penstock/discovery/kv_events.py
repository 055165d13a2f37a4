"""The KV-cache events of engines on the wire: MessagePack batches as vLLM and SGLang send them.

A batch is `[timestamp, [event, ...], data-parallel rank]`. An event is a map with `type` (vLLM from 0.32 on)
or an array that begins with it (SGLang, older vLLM), the fields in the order of the structs below; what comes
after them is passed over. Hashes are 64-bit integers, signed in SGLang, or bytes.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

MAX_EVENTS = 4096
# A prompt of a million tokens in blocks of 16.
MAX_EVENT_BLOCKS = 65_536
MAX_EVENT_TOKENS = 1_048_576
MAX_BLOCK_SIZE = 1024
# An event that does not name its medium is of the GPU; copies elsewhere are no prefix that is there at once.
_GPU = frozenset({"", "gpu"})

BlockKey = Annotated[int, msgspec.Meta(ge=-(2**63))] | Annotated[bytes, msgspec.Meta(max_length=64)]
_Keys = Annotated[list[BlockKey], msgspec.Meta(max_length=MAX_EVENT_BLOCKS)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class KvEventError(Exception):
    """A message that is no batch of events, in words."""


class BlockStored(msgspec.Struct, frozen=True):
    """A run of blocks, each the child of the one before, the first of `parent` (None: it begins a prompt).

    `tokens` holds `block_size` ids a block. `salt` separates prompts as the client asked; `adapter` is the
    LoRA adapter's name. `whole` is false if the blocks hold more than their tokens say, such as images.
    """

    keys: tuple[BlockKey, ...]
    parent: BlockKey | None
    tokens: tuple[int, ...]
    block_size: int
    adapter: str = ""
    salt: str = ""
    whole: bool = True


class BlockRemoved(msgspec.Struct, frozen=True):
    """Blocks that are evicted."""

    keys: tuple[BlockKey, ...]


class AllBlocksCleared(msgspec.Struct, frozen=True):
    """The KV cache is empty."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True):
    timestamp: Any
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]
    dp_rank: int | None = None


class _Stored(msgspec.Struct, tag="BlockStored", tag_field="type"):
    block_hashes: _Keys
    parent_block_hash: BlockKey | None
    token_ids: Annotated[list[_TokenId], msgspec.Meta(max_length=MAX_EVENT_TOKENS)]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCK_SIZE)]
    lora_id: Any = None
    medium: _Text | None = None
    lora_name: _Text | None = None
    extra_keys: Annotated[list[Any], msgspec.Meta(max_length=MAX_EVENT_BLOCKS)] | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", tag_field="type"):
    block_hashes: _Keys
    medium: _Text | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", tag_field="type"):
    pass


class _StoredArray(_Stored, tag="BlockStored", array_like=True):
    pass


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True):
    pass


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True):
    pass


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_map = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared).decode
_decode_array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray).decode


def decode_sequence(frame: bytes) -> int:
    """The sequence number of a message, 8 bytes big-endian. Raises KvEventError."""
    if len(frame) != 8:
        raise KvEventError(f"a sequence number of {len(frame)} bytes")
    return int.from_bytes(frame, "big")


def decode_batch(payload: bytes) -> tuple[list[KvEvent], int | None]:
    """(events in their order, data-parallel rank) of a batch. Events of kinds that are not known, and those
    about other media than the GPU or further groups of a hybrid model, are passed over.

    Raises:
        KvEventError: it is none, or an event is not as it should be; nothing else, whatever the bytes.
    """
    try:
        batch = _decode_batch(payload)
        events = [event for raw in batch.events if (event := _event(bytes(raw))) is not None]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise KvEventError(f"not a batch of KV-cache events ({len(payload)} bytes): {exc}") from None
    return events, batch.dp_rank


def _event(raw: bytes) -> KvEvent | None:
    try:
        # Arrays begin with 0x90..0x9f, 0xdc or 0xdd.
        is_array = raw[0] & 0xF0 == 0x90 or raw[0] in (0xDC, 0xDD)
        said = _decode_array(raw) if is_array else _decode_map(raw)
    except msgspec.ValidationError as exc:
        if "Invalid value '" in str(exc):
            # Another release's kind of event.
            return None
        raise
    if isinstance(said, _Cleared):
        return AllBlocksCleared()
    if said.group_idx not in (None, 0) or (said.medium or "").lower() not in _GPU:
        return None
    if isinstance(said, _Removed):
        return BlockRemoved(tuple(said.block_hashes))
    return _stored(said)


def _stored(said: _Stored) -> BlockStored:
    if len(said.token_ids) != said.block_size * len(said.block_hashes):
        raise ValueError("token_ids are not block_size ids for each of block_hashes")
    adapter = said.lora_name or ""
    # An adapter without a name is one that no client can be matched with.
    nameless = said.lora_id not in (None, -1) and not adapter
    salt, whole = _extra(said.extra_keys or [], adapter, first=said.parent_block_hash is None)
    return BlockStored(
        tuple(said.block_hashes),
        said.parent_block_hash,
        tuple(said.token_ids),
        said.block_size,
        adapter,
        salt,
        whole and not nameless,
    )


def _extra(keys: list[Any], adapter: str, *, first: bool) -> tuple[str, bool]:
    """(salt, whether that and the adapter's name are all that the keys hold): vLLM puts the name with every
    block, the salt with a prompt's first one, digests of images with the blocks they lie in."""
    salt, whole = "", True
    for position, of_block in enumerate(keys):
        if of_block is None:
            continue
        if not isinstance(of_block, list):
            whole = False
            continue
        rest = [key for key in of_block if not adapter or key != adapter]
        if first and position == 0 and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest[0]
        elif rest:
            whole = False
    return salt, whole
