"""A chunked body is followed through whatever pieces it comes in, and nothing after a fault is relayed."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.http_wire import LAST_CHUNK, BadFraming

_extension = st.sampled_from([b"", b" ", b"\t ", b";a", b";a=b", b' ; a="b"', b";" + b"x" * 200])
_digits = st.sampled_from([b"%x", b"%X", b"0%x", b"000000000%x"])
_chunk = st.builds(
    lambda data, form, extension: (data, form % len(data) + extension + b"\r\n" + data + b"\r\n"),
    st.binary(min_size=1, max_size=40) | st.binary(min_size=250, max_size=300),
    _digits,
    _extension,
)
_last = st.builds(
    lambda zeros, extension, trailer: zeros + extension + b"\r\n" + trailer + b"\r\n",
    st.sampled_from([b"0", b"000"]),
    _extension,
    st.sampled_from([b"", b"a: b\r\n", b"a: b\r\nC:\r\n", b"big: " + b"x" * 8000 + b"\r\n"]),
)
_rest = st.sampled_from([b"", b"\r\n", b"POST / HTTP/1.1\r\nhost: a\r\n\r\n"])


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if b > a]


def follow(body: ChunkedBody, data: list[bytes]) -> tuple[bytes, bytes]:
    """What was relayed, and what came after the end."""
    relayed = rest = b""
    for piece in data:
        if body.done:
            rest += piece
        else:
            relayed += body.feed(piece)
    return relayed, body.rest + rest


def relay(body: ChunkedBody, data: list[bytes], relayed: bytearray) -> None:
    for piece in data:
        relayed += body.feed(piece)


@given(st.lists(_chunk, max_size=6), _last, _rest, st.lists(st.integers(0, 5000), max_size=12))
def test_any_pieces_of_a_chunked_body_give_the_same_wire_bytes_payload_and_rest(
    chunks: list[tuple[bytes, bytes]], last: bytes, rest: bytes, cuts: list[int]
) -> None:
    wire = b"".join(line for _, line in chunks)
    body = ChunkedBody(collect=True)
    assert follow(body, pieces(wire + last + rest, cuts)) == (wire, rest)
    assert body.done
    assert bytes(body.data) == b"".join(data for data, _ in chunks)
    assert body.size == len(body.data)


@given(st.lists(_chunk, min_size=1, max_size=4), st.lists(st.integers(0, 2000), max_size=8))
def test_what_was_relayed_ends_with_a_whole_chunk_exactly_where_it_says_so(
    chunks: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    wire, boundaries, at = b"".join(line for _, line in chunks), {0}, 0
    for _, line in chunks:
        at += len(line)
        boundaries.add(at)
    body, relayed = ChunkedBody(), 0
    for piece in pieces(wire, cuts):
        relayed += len(body.feed(piece))
        assert body.between_chunks == (relayed in boundaries)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
def test_a_relayed_body_with_the_last_chunk_put_on_reads_as_the_same_payload(step: int) -> None:
    chunks = b"5\r\nhello\r\n1;x=y\r\n \r\n6\r\nworld\n\r\n"
    wire = chunks + b"0\r\ntrailer: gone\r\n\r\n"
    relayed, _ = follow(ChunkedBody(), [wire[i : i + step] for i in range(0, len(wire), step)])
    again = ChunkedBody(collect=True)
    assert follow(again, [relayed + LAST_CHUNK]) == (chunks, b"")
    assert bytes(again.data) == b"hello world\n"


FAULTS = [
    pytest.param(b"g\r\n", id="not hexadecimal"),
    pytest.param(b"-5\r\nhello\r\n", id="minus"),
    pytest.param(b"+5\r\nhello\r\n", id="plus"),
    pytest.param(b"0x5\r\nhello\r\n", id="0x"),
    pytest.param(b" 5\r\nhello\r\n", id="leading space"),
    pytest.param(b"5_0\r\n", id="underscore"),
    pytest.param(b"\r\n", id="empty size"),
    pytest.param(b";x\r\n", id="extension only"),
    pytest.param(b"5,5\r\nhello\r\n", id="list"),
    pytest.param(b"5\nhello\r\n", id="bare LF after the size"),
    pytest.param(b"5;a\rb\r\nhello\r\n", id="CR in an extension"),
    pytest.param(b"5;a\nb\r\nhello\r\n", id="LF in an extension"),
    pytest.param(b"5;\0\r\nhello\r\n", id="NUL in an extension"),
    pytest.param(b"5 x\r\nhello\r\n", id="text after the size"),
    pytest.param(b"ffffffffffffffff\r\nx", id="sixteen digits"),
    pytest.param(b"0000000000000005\r\nhello\r\n", id="sixteen digits with zeros"),
    pytest.param(b"5;" + b"x" * 300 + b"\r\nhello\r\n", id="size line too long"),
    pytest.param(b"x" * 300, id="endless size line"),
    pytest.param(b"5\r\nhelloX\r\n", id="longer than its size"),
    pytest.param(b"5\r\nhello\n", id="bare LF after the data"),
    pytest.param(b"5\r\nhello\rX", id="CR without LF after the data"),
    pytest.param(b"5\r\nhell\r\n0\r\n\r\n", id="shorter than its size"),
    pytest.param(b"0\r\nno colon\r\n\r\n", id="trailer without colon"),
    pytest.param(b"0\r\na : b\r\n\r\n", id="space before a trailer's colon"),
    pytest.param(b"0\r\n a: b\r\n\r\n", id="folded trailer"),
    pytest.param(b"0\r\na: b\n\r\n", id="bare LF in the trailer"),
    pytest.param(b"0\r\n\n", id="trailer ended by LF"),
    pytest.param(b"0\r\na: b\0\r\n\r\n", id="NUL in the trailer"),
    pytest.param(b"0\r\na: " + b"x" * 8200 + b"\r\n\r\n", id="trailer too long"),
    pytest.param(b"0\r\n" + b"a: b\r\n" * 2000 + b"\r\n", id="too many trailer fields"),
]


@pytest.mark.parametrize("step", [1, 5, 100_000])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_a_faulty_chunk_or_after_it_is_relayed(fault: bytes, step: int) -> None:
    good = b"3\r\nabc\r\n"
    wire, relayed = good + fault + b"5\r\nafter\r\n", bytearray()
    with pytest.raises(BadFraming):
        relay(ChunkedBody(), [wire[start : start + step] for start in range(0, len(wire), step)], relayed)
    assert b"after" not in relayed
    assert (good + fault).startswith(relayed)


@given(st.sampled_from([p.values[0] for p in FAULTS]), st.lists(st.integers(0, 9000), max_size=6))
def test_a_fault_is_found_in_any_pieces(fault: bytes, cuts: list[int]) -> None:
    body = ChunkedBody()
    with pytest.raises(BadFraming):
        relay(body, pieces(fault + b"5\r\nafter\r\n" + b"x" * 300, cuts), bytearray())
    assert not body.done


@pytest.mark.parametrize("trailer_bytes", [8191, 8192, 8193, 8194])
def test_the_bound_of_a_trailer_does_not_depend_on_the_pieces_it_comes_in(trailer_bytes: int) -> None:
    wire = b"0\r\na:" + b"x" * (trailer_bytes - 4) + b"\r\n\r\n"
    for size in (1, 2, len(wire)):
        body = ChunkedBody()
        accepted = True
        try:
            follow(body, [wire[i : i + size] for i in range(0, len(wire), size)])
        except BadFraming:
            accepted = False
        assert (accepted, body.done) == ((True, True) if trailer_bytes <= 8192 else (False, False))


def test_the_largest_chunk_size_is_followed_without_being_awaited() -> None:
    body = ChunkedBody()
    assert body.feed(b"fffffffffffffff\r\nabc") == b"fffffffffffffff\r\nabc"
    assert (body.size, body.done, body.between_chunks) == (3, False, False)
