"""Reads a whole prefix from etcd in pages of one revision, and the proof that a watch missed nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.discovery.adapters.etcd_client import AnswerTooLarge, EtcdClient, MemberFailed, prefix_end
from penstock.discovery.etcd_table import Bounds, Listing
from penstock.discovery.etcd_wire import Header, KeyValue, RangeAnswer

RANGE = "/v3/kv/range"
PAGE = 128


async def list_prefix(client: EtcdClient, prefix: bytes, bounds: Bounds) -> Listing:
    """All keys, in order. A page that is too large is asked for in smaller ones; a value that is too
    large by itself is left out.

    Raises:
        EtcdError: from `client`.
    """
    kvs: list[KeyValue] = []
    header: Header | None = None
    start, limit, value_bytes, more = prefix, PAGE, 0, True
    while more and len(kvs) < bounds.records and value_bytes <= bounds.value_bytes:
        page = {"key": start, "range_end": prefix_end(prefix), "limit": limit}
        if header is not None:
            page["revision"] = header.revision
        answer = await _page(client, page)
        if answer is None:
            limit = max(1, limit // 8)
            continue
        header = header or answer.header
        kvs += answer.kvs
        value_bytes += sum(len(kv.value or b"") for kv in answer.kvs)
        # An answer without a key cannot be continued.
        more = answer.more and bool(answer.kvs)
        start = kvs[-1].key + b"\0" if kvs else prefix
        limit = min(PAGE, 2 * limit)
    cut = more or len(kvs) > bounds.records
    return Listing(header or Header(), tuple(kvs[: bounds.records]), cut)


async def _page(client: EtcdClient, page: dict[str, Any]) -> RangeAnswer | None:
    """None if it has to be smaller."""
    try:
        return await _ask(client, page)
    except AnswerTooLarge:
        if page["limit"] > 1:
            return None
    keys = await _ask(client, {**page, "keys_only": True})
    nameless = tuple(msgspec.structs.replace(kv, value=None) for kv in keys.kvs)
    return msgspec.structs.replace(keys, kvs=nameless)


async def _ask(client: EtcdClient, page: dict[str, Any]) -> RangeAnswer:
    answer = await client.call(RANGE, page, RangeAnswer)
    if answer.header.revision <= 0:
        # Something that says yes to everything must not empty the list.
        member = client.member
        client.leave(member)
        raise MemberFailed(f"{member} answers without a revision: it is not etcd")
    return answer


async def ask_newest(client: EtcdClient, member: str, prefix: bytes) -> tuple[Header, int, int]:
    """What `member` holds now: its header, the number of keys, and the revision of the last change.

    Raises:
        EtcdError: from `client`.
    """
    last = {
        "key": prefix,
        "range_end": prefix_end(prefix),
        "limit": 1,
        "keys_only": True,
        "sort_target": "MOD",
        "sort_order": "DESCEND",
    }
    answer = await client.ask(member, RANGE, last, RangeAnswer)
    return answer.header, answer.count, answer.kvs[0].mod_revision if answer.kvs else 0
