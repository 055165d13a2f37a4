"""Block hashes of tokens (DESIGN 3.4), as the ingress makes them of prompts and discovery of what engines
announce: xxh3-64 over the ids of a block, each a little-endian u32, seeded with the hash before it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import xxhash

TOKEN_BYTES, HASH_BYTES = 4, 8
MAX_TOKEN_ID: Final = 2**32 - 1
_BIG_ENDIAN: Final = sys.byteorder == "big"


def root_seed(secret: str, model: str, salt: str = "") -> int:
    """Seed of a chain: without the secret a log reader could test guesses of prompts (DESIGN D13)."""
    return xxhash.xxh3_64_intdigest(f"{len(secret)}:{secret}\0{len(model)}:{model}\0{salt}".encode())


def pack_tokens(ids: Sequence[int]) -> bytes:
    """Token ids as the chain takes them. Raises ValueError for one outside 0..2^32-1."""
    try:
        return _little(array("I", ids))
    except OverflowError:
        raise ValueError(f"a token id is not within 0..{MAX_TOKEN_ID}") from None


def token_chain(tokens: bytes, seed: int, block_size: int, most: int) -> list[int]:
    """Hashes of the whole blocks of `block_size` tokens, at most `most`; `tokens` as packed above."""
    view, width = memoryview(tokens), TOKEN_BYTES * block_size
    digest = xxhash.xxh3_64_intdigest
    hashes: list[int] = []
    for start in range(0, min(len(tokens) - width + 1, most * width), width):
        seed = digest(view[start : start + width], seed)
        hashes.append(seed)
    return hashes


def salted(hashes: bytes, salt: int) -> bytes:
    """Packed hashes, each combined with a salt of 64 bits: equal prompts match under equal salts only."""
    size = len(hashes)
    mask = salt.to_bytes(HASH_BYTES, "little") * (size // HASH_BYTES)
    return (int.from_bytes(hashes, "little") ^ int.from_bytes(mask, "little")).to_bytes(size, "little")


def pack_hashes(hashes: Iterable[int]) -> bytes:
    """Hashes as they travel: little-endian u64."""
    return _little(array("Q", hashes))


def _little(numbers: array[int]) -> bytes:
    if _BIG_ENDIAN:
        numbers.byteswap()
    return numbers.tobytes()
