"""Bodies that are legal HTTP, as large as the gateway takes them, and unpleasant to parse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice

from penstock.cli.bench.wire import MODEL

# The default of --buffer-limit.
BODY_BYTES = 4 * 1024 * 1024
_BEGIN = f'{{"model":"{MODEL}","max_tokens":16,'.encode()
_MESSAGES = b'"messages":[{"role":"user","content":"hello"}],'


def _nested() -> bytes:
    """Arrays in arrays: as deep as the body is long."""
    begin, end = _BEGIN + b'"messages":', b"}"
    depth = (BODY_BYTES - len(begin) - len(end)) // 2
    return begin + b"[" * depth + b"]" * depth + end


def _arrays() -> bytes:
    """Many arrays, each nested no deeper than a parser may allow."""
    return _filled(_BEGIN + b'"messages":[', [b"[" * 100 + b"]" * 100 + b","], b"0]}")


def _keys() -> bytes:
    """One object with as many keys as there is room for."""
    keys = [b'"k%07x":0,' % number for number in range(BODY_BYTES // len(b'"k0000000":0,'))]
    return _filled(_BEGIN + _MESSAGES, keys, b'"end":0}')


def _numbers() -> bytes:
    """Numbers with more digits than a float can hold."""
    number = b"0.12345678901234567890123456789e-300,"
    return _filled(_BEGIN + _MESSAGES + b'"logit_bias":[', [number], b"0]}")


def _string() -> bytes:
    """A prompt of one string, every character of it escaped."""
    return _filled(_BEGIN + b'"messages":[{"role":"user","content":"', [b"\\u00e9"], b'"}]}')


def _text() -> bytes:
    """A prompt of one string, as people write."""
    return _filled(
        _BEGIN + b'"messages":[{"role":"user","content":"', [b"lorem ipsum dolor sit amet "], b'"}]}'
    )


def _twice() -> bytes:
    """The same prompt under the same key, over and over; the last one counts."""
    return _filled(_BEGIN + _MESSAGES, [_MESSAGES], b'"stream":false}')


def _utf8() -> bytes:
    """A prompt that is not UTF-8 in many places."""
    return _filled(_BEGIN + b'"messages":[{"role":"user","content":"', [b"\xc3\xa9 \xff"], b'"}]}')


def _filled(begin: bytes, pieces: Sequence[bytes], end: bytes) -> bytes:
    """As many pieces, which are of one length, as there is room for."""
    count = (BODY_BYTES - len(begin) - len(end)) // len(pieces[0])
    return begin + b"".join(islice(cycle(pieces), count)) + end


SHAPES: dict[str, Callable[[], bytes]] = {
    "nested": _nested,
    "arrays": _arrays,
    "keys": _keys,
    "numbers": _numbers,
    "string": _string,
    "text": _text,
    "twice": _twice,
    "utf8": _utf8,
}
