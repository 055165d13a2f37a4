"""Traces in Mooncake's format: one JSON object a line, prompts as ids of fixed-size blocks.

`timestamp` is ms from the start, `input_length` and `output_length` are tokens, `hash_ids` one id per block
of the prompt, of which the last may be partial: equal ids from the front on are a reusable prefix.
"""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, cast

import msgspec
import xxhash

from penstock.common.messages import MAX_BLOCKS

MAX_LINE_BYTES = 1 << 20
MAX_REQUESTS = 1_000_000
# Of one prompt or answer; more is a fault of the trace.
MAX_TOKENS = 10_000_000

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class TraceFault(ValueError):
    """A trace cannot be used; the message says where and why."""


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    output_length: _Tokens
    hash_ids: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]], msgspec.Meta(max_length=MAX_BLOCKS)
    ]


class TraceRequest(msgspec.Struct, frozen=True):
    """One request: `at_s` from the start of the trace, the full blocks of its prompt as the bus has them."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    packed_hashes: bytes


def read(path: Path, block_tokens: int, limit: int = 0) -> list[TraceRequest]:
    """The first `limit` requests in order of time (0: all); a name that ends in .gz is unpacked.

    Raises:
        TraceFault: with the line's number.
    """
    try:
        with _open(path) as opened:
            lines = islice(_lines(opened), limit or None)
            requests = [_request(number, line, block_tokens) for number, line in lines]
    except (OSError, EOFError) as exc:
        raise TraceFault(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    except TraceFault as exc:
        raise TraceFault(f"{path}: {exc}") from exc
    if not requests:
        raise TraceFault(f"{path}: holds no requests")
    return sorted(requests, key=lambda request: request.at_s)


def timed(requests: Sequence[TraceRequest], rate_scale: float, *, spread: bool) -> list[float]:
    """When each request arrives, in seconds: `rate_scale` times as fast as recorded.

    Recorders round times (Mooncake's to 3 s), so that requests come in bursts. `spread` puts those with equal
    times evenly before the next time.
    """
    times = [request.at_s for request in requests]
    if spread:
        times = list(_spread(times))
    return [at_s / rate_scale for at_s in times]


def _spread(times: Sequence[float]) -> Iterator[float]:
    together = Counter(times)
    distinct = list(together)
    gap_s = 0.0
    for at_s, after_s in zip(distinct, [*distinct[1:], None], strict=True):
        # What follows the last time is unknown: as much as before it.
        gap_s = after_s - at_s if after_s is not None else gap_s
        count = together[at_s]
        yield from (at_s + gap_s * number / count for number in range(count))


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _lines(opened: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number in range(1, MAX_REQUESTS + 2):
        line = opened.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise TraceFault(f"line {number} is longer than {MAX_LINE_BYTES} bytes")
        if number > MAX_REQUESTS:
            raise TraceFault(f"has more than {MAX_REQUESTS} requests: take the first ones with --limit")
        if not line.isspace():
            yield number, line


def _request(number: int, line: bytes, block_tokens: int) -> TraceRequest:
    try:
        entry = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise TraceFault(f"line {number}: {exc}") from exc
    full, whole = entry.input_length // block_tokens, -(-entry.input_length // block_tokens)
    if len(entry.hash_ids) > whole:
        raise TraceFault(
            f"line {number}: {len(entry.hash_ids)} hash_ids, but {entry.input_length} tokens are {whole} "
            f"blocks of {block_tokens}; --block-size says how many tokens a block of the trace has"
        )
    hashes = list(_chained(entry.hash_ids[:full]))
    packed = struct.pack(f"<{len(hashes)}Q", *hashes)
    return TraceRequest(entry.timestamp / 1000.0, entry.input_length, entry.output_length, packed)


def _chained(ids: Iterable[int]) -> Iterator[int]:
    """Hashes as an ingress makes them: spread over 64 bits, and equal only after equal parents."""
    parent = 0
    for one in ids:
        parent = xxhash.xxh3_64_intdigest(one.to_bytes(8, "little"), seed=parent)
        yield parent
