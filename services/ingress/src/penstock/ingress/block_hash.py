"""Prompt -> chain of block hashes (DESIGN 3.4): xxh3-64, each block seeded with the hash before it.

Blocks are bytes of the prompt as it stands in the body, in runs of 64; the first run's blocks have
`block_bytes`, each further run's twice as many, so that 512 hashes cover 16 MiB at 256 bytes. Re-ordered
JSON loses its match. Only whole blocks are hashed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import xxhash

from penstock.common.block_hash import pack_hashes, root_seed, salted

RUN_BLOCKS: Final = 64
MAX_HASHES: Final = 512
# Text between two quotes this long (pasted documents, images) enters as one digest: hashing it by block
# buys nothing.
LONG_STRING_BYTES: Final = 64 * 1024
# Two blocks of the default size: a digest fills at least one block, wherever it lies. A prompt that is
# one long document would otherwise be shorter than a block and have no hash at all.
DIGEST_BYTES: Final = 512
# A data URI is condensed from this length on, so that a prompt of at most as many bytes can hold none and
# need not be searched: searching it costs more than hashing it.
DATA_URI_BYTES: Final = 4096
MAX_DATA_URIS: Final = 2048
MAX_MEDIA_TYPE_BYTES: Final = 128
_digest_of: Final = xxhash.xxh3_64_intdigest
_BASE64: Final = b";base64,"
_MEDIA_TYPE: Final = re.compile(rb"data:[\w.+-]+/[\w.+-]+")
_BASE64_TEXT: Final = re.compile(rb"[A-Za-z0-9+/=]*")


def condense(prompt: bytes) -> bytes:
    """The prompt with data URIs and very long strings replaced by their digests.

    A string with escaped quotes counts from quote to quote. The cost is linear for any bytes.
    """
    if len(prompt) > DATA_URI_BYTES and _may_hold_data(prompt) and _BASE64 in prompt:
        prompt = _digested(prompt, _data_uris(prompt))
    if len(prompt) <= LONG_STRING_BYTES:
        return prompt
    return _digested(prompt, _long_strings(prompt))


def _may_hold_data(prompt: bytes) -> bool:
    """Whether there may be DATA_URI_BYTES of base64 in it: such a text covers a whole step of half that size.
    A space or a quote is found at once in text, where a search for `;base64,` costs 1 us a KB."""
    step = DATA_URI_BYTES // 2
    for start in range(0, len(prompt) - step + 1, step):
        stop = start + step
        if prompt.find(b" ", start, stop) < 0 and prompt.find(b'"', start, stop) < 0:
            return True
    return False


def _digested(prompt: bytes, spans: Iterator[tuple[int, int]]) -> bytes:
    parts: list[bytes] = []
    end = 0
    for start, stop in spans:
        parts += prompt[end:start], _digest(prompt[start:stop])
        end = stop
    return b"".join((*parts, prompt[end:]))


def _data_uris(prompt: bytes) -> Iterator[tuple[int, int]]:
    """Where data URIs with at least DATA_URI_BYTES of base64 stand.

    Sought by their middle, and no further than that many of them: one expression for the whole took 25 ms
    for 4 MiB of beginnings of URIs. What comes first stays condensed when a conversation grows.
    """
    floor, middle = 0, prompt.find(_BASE64)
    for _ in range(MAX_DATA_URIS):
        if middle < 0:
            return
        start = prompt.rfind(b"data:", max(floor, middle - MAX_MEDIA_TYPE_BYTES), middle)
        stop = text = middle + len(_BASE64)
        if start >= 0 and _MEDIA_TYPE.fullmatch(prompt, start, middle):
            match = _BASE64_TEXT.match(prompt, text)
            stop = match.end() if match else text
            if stop - text >= DATA_URI_BYTES:
                yield start, stop
                floor = stop
        middle = prompt.find(_BASE64, stop)


def _long_strings(prompt: bytes) -> Iterator[tuple[int, int]]:
    """Where text of at least LONG_STRING_BYTES stands between two quotes.

    Each of them covers a whole step of half that size, so most bytes of other prompts are never looked
    at; a regular expression takes seconds for 64 KiB of escapes, as it tries every quote as a beginning.
    """
    step = LONG_STRING_BYTES // 2
    floor = position = 0
    while position + step <= len(prompt):
        if prompt.find(b'"', position, position + step) >= 0:
            position += step
            continue
        start, stop = prompt.rfind(b'"', floor, position) + 1, prompt.find(b'"', position + step)
        if stop < 0:
            return
        if start and stop - start >= LONG_STRING_BYTES:
            yield start, stop
        floor = position = stop


def _digest(text: bytes) -> bytes:
    return (b"%032x" % xxhash.xxh3_128_intdigest(text)) * (DIGEST_BYTES // 32)


def chain(prompt: bytes, seed: int, block_bytes: int) -> bytes:
    """Packed little-endian u64 hashes of the whole blocks of `prompt`."""
    length = len(prompt)
    hashes: list[int] = []
    position, size = 0, block_bytes
    while position + size <= length and len(hashes) < MAX_HASHES:
        stop = min(length, position + size * RUN_BLOCKS)
        while position + size <= stop:
            # A copy of it costs less than a view.
            seed = _digest_of(prompt[position : position + size], seed)
            hashes.append(seed)
            position += size
        position = stop
        size *= 2
    return pack_hashes(hashes)


def of_tenant(hashes: bytes, secret: str, by: str, user: str, owner: str) -> bytes:
    """Hashes that match no other tenant's; `by` is the setting --block-hash-tenant."""
    if by == "none":
        return hashes
    return salted(hashes, root_seed(secret, "", f"{by}\0{user if by == 'user' else owner}"))
