"""Prompt -> chain of block hashes (DESIGN 3.4): xxh3-64, each block seeded with the hash before it.

Blocks are bytes of the prompt as it stands in the body, in runs of 64; the first run's blocks have
`block_bytes`, each further run's twice as many, so that 512 hashes cover 16 MiB at 256 bytes. Re-ordered
JSON loses its match. Only whole blocks are hashed.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator

import xxhash

RUN_BLOCKS = 64
MAX_HASHES = 512
# Text between two quotes this long (pasted documents, images) enters as one digest: hashing it by block
# buys nothing.
LONG_STRING_BYTES = 64 * 1024
# Two blocks of the default size: a digest fills at least one block, wherever it lies. A prompt that is
# one long document would otherwise be shorter than a block and have no hash at all.
DIGEST_BYTES = 512
# A data URI is condensed from this length on, so that a prompt of at most as many bytes can hold none and
# need not be searched: searching it costs more than hashing it.
DATA_URI_BYTES = 4096
_DATA_URI = re.compile(rb"data:[\w.+-]+/[\w.+-]+;base64,[A-Za-z0-9+/=]{%d,}" % DATA_URI_BYTES)


def root_seed(secret: str, model: str, salt: str = "") -> int:
    """Seed of a chain: without the secret a log reader could test guesses of prompts (DESIGN D13)."""
    return xxhash.xxh3_64_intdigest(f"{len(secret)}:{secret}\0{len(model)}:{model}\0{salt}".encode())


def condense(prompt: bytes) -> bytes:
    """The prompt with data URIs and very long strings replaced by their digests.

    A string with escaped quotes counts from quote to quote. The cost is linear for any bytes.
    """
    if len(prompt) > DATA_URI_BYTES and b";base64," in prompt:
        prompt = _DATA_URI.sub(lambda match: _digest(match[0]), prompt)
    if len(prompt) <= LONG_STRING_BYTES:
        return prompt
    parts: list[bytes] = []
    end = 0
    for start, stop in _long_strings(prompt):
        parts += prompt[end:start], _digest(prompt[start:stop])
        end = stop
    return b"".join((*parts, prompt[end:]))


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
    view, length = memoryview(prompt), len(prompt)
    digest = xxhash.xxh3_64_intdigest
    hashes: list[int] = []
    position, size = 0, block_bytes
    while position + size <= length and len(hashes) < MAX_HASHES:
        stop = min(length - size, position + size * (RUN_BLOCKS - 1))
        for start in range(position, stop + 1, size):
            seed = digest(view[start : start + size], seed)
            hashes.append(seed)
        position += size * RUN_BLOCKS
        size *= 2
    packed = array("Q", hashes)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
