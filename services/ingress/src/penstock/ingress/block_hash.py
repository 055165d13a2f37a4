"""Prompt -> chain of block hashes (DESIGN 3.4): xxh3-64, each block seeded with the hash before it.

Blocks are bytes of the prompt as it stands in the body, in runs of 64; the first run's blocks have
`block_bytes`, each further run's twice as many, so that 512 hashes cover 16 MiB at 256 bytes. Re-ordered
JSON loses its match. Only whole blocks are hashed.
"""

from __future__ import annotations

import re
import sys
from array import array

import xxhash

RUN_BLOCKS = 64
MAX_HASHES = 512
# Strings this long (pasted documents, images) enter as one digest: hashing them by block buys nothing.
LONG_STRING_BYTES = 64 * 1024
_DATA_URI = re.compile(rb"data:[\w.+-]+/[\w.+-]+;base64,[A-Za-z0-9+/=]{64,}")
_LONG_STRING = re.compile(rb'"(?:[^"\\]|\\.){%d,}"' % LONG_STRING_BYTES, re.DOTALL)


def root_seed(secret: str, model: str, salt: str = "") -> int:
    """Seed of a chain: without the secret a log reader could test guesses of prompts (DESIGN D13)."""
    return xxhash.xxh3_64_intdigest(f"{len(secret)}:{secret}\0{len(model)}:{model}\0{salt}".encode())


def condense(prompt: bytes) -> bytes:
    """The prompt with data URIs and very long strings replaced by their digests."""
    if b";base64," in prompt:
        prompt = _DATA_URI.sub(_digest, prompt)
    if len(prompt) > LONG_STRING_BYTES:
        prompt = _LONG_STRING.sub(_digest, prompt)
    return prompt


def _digest(match: re.Match[bytes]) -> bytes:
    return b"%032x" % xxhash.xxh3_128_intdigest(match[0])


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
