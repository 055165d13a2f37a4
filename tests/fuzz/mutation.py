"""Bytes that are nearly right: mutations of a corpus, each run from a seed that is printed on failure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MAX_BYTES = 4096
# Fragments on which parsers of HTTP and JSON disagree.
TOKENS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\0", b"\x0b", b"\x7f", b"\x80", b"\xff",
    b":", b";", b",", b"=", b'"', b"0", b"1", b"-1", b"+1", b"0x1", b"f" * 15, b"9" * 18, b"9" * 19, b"00",
    b"1_0", b"Content-Length: 1\r\n", b"Content-Length: 0\r\n", b"Content-Length: 1, 1\r\n",
    b"content-length:\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n", b"transfer-encoding : chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n", b"Connection: close\r\n", b"Connection: content-length\r\n",
    b"Host: a\r\n", b"Expect: 100-continue\r\n", b" folded\r\n", b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.2",
    b"HTTP/2", b"GET ", b"POST ", b"HEAD ", b" 204 ", b" 304 ", b" 100 ", b"0\r\n\r\n", b"1\r\nx\r\n",
    b"1;a=b\r\nx\r\n", b"0\r\na: b\r\n\r\n", b"{", b"}", b"[", b"]", b"null", b"NaN", b"1e999", b"\\u0000",
    b"\\ud800", b'"model":"m"', b"\xef\xbb\xbf", b"\xc1", b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff",
)  # fmt: skip


def corpus(target: str) -> list[bytes]:
    """The saved inputs of one target, in the order of their names."""
    inputs = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert inputs, f"no corpus for {target}"
    return inputs


def mutants(seeds: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """Without end: a seed with a few changes."""
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change(data, rng, seeds)
        yield bytes(data[:MAX_BYTES])


def _change(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    start = rng.randint(0, len(data))
    stop = min(len(data), start + rng.choice((1, 1, 2, 8, 64)))
    match rng.randrange(6):
        case 0:
            data[start:start] = rng.choice(TOKENS)
        case 1:
            data[start:stop] = rng.choice(TOKENS)
        case 2:
            del data[start:stop]
        case 3:
            data[start:start] = data[start:stop] * rng.randint(1, 3)
        case 4:
            data[start:stop] = bytes([rng.randrange(256)])
        case _:
            other = rng.choice(seeds)
            data[start:] = other[rng.randint(0, len(other)) :]


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    """The bytes cut at random places, now and then everywhere or nowhere."""
    if not data:
        return []
    kind = rng.randrange(4)
    if kind == 0:
        return [data]
    if kind == 1 and len(data) < 512:
        return [data[n : n + 1] for n in range(len(data))]
    cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(rng.randint(1, 6)))})
    return [data[a:b] for a, b in itertools.pairwise(cuts)]
