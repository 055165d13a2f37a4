"""Large bodies: read elsewhere with the same outcome, put together from any pieces, in fair turns."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.block_hash import root_seed
from penstock.ingress.adapters.body_helper import Helper
from penstock.ingress.block_hash import chain, condense
from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.failures import GatewayError
from penstock.ingress.large_bodies import Facts, FairQueue, Refusal, Setup, SizedBody, Task, read
from penstock.ingress.openai import GENERATION_PATHS, MULTIPART_PATHS, parse

SETUP = Setup("a secret", 16)
FORM = "multipart/form-data; boundary=xyz"

_text = st.text(max_size=200)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=8,
)
_fields = st.fixed_dictionaries(
    {},
    optional={
        "model": _text | st.just("m") | _json,
        "messages": st.lists(_json, max_size=3) | _json,
        "prompt": _text | _json,
        "input": _text | _json,
        "documents": _json,
        "stream": st.booleans() | _json,
        "max_tokens": st.integers(-(2**70), 2**70) | _json,
        "cache_salt": _text | _json,
        "tools": _json,
    },
)
_objects = st.builds(
    lambda fields, ascii_only: json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"),
    _fields,
    st.booleans(),
)
_valid = st.builds(
    lambda model, prompt, salt: json.dumps(
        {"model": model or "m", "messages": [prompt], "prompt": prompt, "input": prompt, "cache_salt": salt}
    ).encode(),
    _text,
    st.text(min_size=1, max_size=600),
    _text,
)
_forms = st.builds(
    lambda name, value: (
        b'--xyz\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n--xyz--\r\n' % (name, value)
    ),
    st.sampled_from([b"model", b"stream", b"file"]),
    st.binary(max_size=100),
)
_cut = st.builds(lambda body, at: body[: at % (len(body) + 1)], _objects | _valid, st.integers(0))
_swapped = st.builds(
    lambda body, old, new: body.replace(old, new),
    _valid,
    st.binary(min_size=1, max_size=1),
    st.binary(max_size=2),
)
_deep = st.builds(
    lambda depth, opened: b'{"model":"m","messages":' + opened * depth,
    st.sampled_from([1, 500, 100_000]),
    st.sampled_from([b"[", b'{"a":']),
)
_twice = st.builds(lambda a, b: a[:-1] + b"," + b[1:], _valid, _valid)
_bodies = _objects | _valid | _forms | _cut | _swapped | _deep | _twice | st.binary(max_size=60)
_paths = st.sampled_from(sorted({*GENERATION_PATHS, *MULTIPART_PATHS}))
_kinds = st.sampled_from(["application/json", FORM, "multipart/form-data", ""])


def on_the_loop(path: bytes, kind: str, body: bytes) -> Facts | Refusal:
    """What `Exchange` and `Gateway` make of a body that is not large."""
    try:
        request = parse(path, kind, body)
    except GatewayError as exc:
        return Refusal(exc.code, exc.message, exc.param)
    seed = root_seed(SETUP.secret, request.model, request.cache_salt)
    hashes = chain(condense(request.prompt), seed, SETUP.block_bytes)
    return Facts(request.model, request.stream, request.prompt_tokens, request.max_tokens, hashes)


@given(_paths, _kinds, _bodies)
def test_a_body_has_the_same_facts_or_fault_wherever_it_is_read(path: bytes, kind: str, body: bytes) -> None:
    assert read(Task(path, kind, len(body)), bytearray(body), SETUP) == on_the_loop(path, kind, body)


def hostile() -> list[bytes]:
    begin = b'{"model":"m","messages":['
    size = 300 * 1024
    return [
        b'{"model":"m","prompt":"' + b"x" * size + b'"}',
        begin + b"[],[[]]," * (size // 8) + b"0]}",
        begin + b'"' + b"\\u00e9" * (size // 6) + b'"]}',
        begin + b'"' + b"\xff" * size + b'"]}',
        begin + b"[" * size + b"]" * size + b"]}",
        begin + b"0.1234567890123456789e-300," * (size // 27) + b"0]}",
        begin + b"0]" + b"".join(b',"k%d":0' % n for n in range(size // 8)) + b"}",
        begin + b"0]" + b',"messages":[1,2]' * (size // 17) + b',"model":"n"}',
        begin + b'"' + (b"data:image/png;base64," + b"A" * 5000 + b" ") * (size // 5023) + b'"]}',
        b"x" * size,
        b"\0" * size,
    ]


async def test_a_helper_process_answers_as_the_loop_would() -> None:
    helper = Helper()
    await helper.open(SETUP)
    try:
        kind = "application/json"
        for path, body in itertools.product([b"/v1/chat/completions", b"/v1/completions"], hostile()):
            answer = await helper.read(Task(path, kind, len(body)), body)
            assert answer == on_the_loop(path, kind, body)
    finally:
        helper.kill()
        await helper.reaped()
    assert helper.process.returncode == -9


def test_a_refusal_becomes_the_error_that_it_was() -> None:
    path, body = b"/v1/chat/completions", b'{"model":"m","messages":1}'
    with pytest.raises(GatewayError) as raised:
        parse(path, "", body)
    answer = read(Task(path, "", len(body)), body, SETUP)
    assert isinstance(answer, Refusal)
    assert vars(answer.error()) == vars(raised.value)


@given(st.binary(min_size=1, max_size=300), st.binary(max_size=20), st.lists(st.integers(0, 400), max_size=6))
def test_a_body_of_known_length_is_whole_whatever_pieces_it_comes_in(
    body: bytes, rest: bytes, cuts: list[int]
) -> None:
    wire = body + rest
    edges = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    sized, after = SizedBody(len(body)), b""
    for start, stop in itertools.pairwise(edges):
        if sized.done:
            after += wire[start:stop]
        elif stop > start:
            sized.feed_some(wire[start:stop])
    assert (bytes(sized.data), sized.done, sized.rest + after) == (body, True, rest)


@given(
    st.lists(st.binary(min_size=1, max_size=9), max_size=20),
    st.integers(0, 900),
    st.integers(1, 700),
    st.integers(1, 9000),
)
def test_a_chunked_body_is_the_same_however_few_chunks_are_taken_at_once(
    chunks: list[bytes], tiny: int, most: int, step: int
) -> None:
    chunks += [b"x"] * tiny + [b"y" * 5000]
    wire = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\nnext"
    body, relayed, after = ChunkedBody(collect=True), b"", b""
    for start in range(0, len(wire), step):
        if body.done:
            after += wire[start : start + step]
            continue
        relayed += body.feed_some(wire[start : start + step], most)
        while body.more:
            relayed += body.feed_some(b"", most)
    assert (bytes(body.data), body.done, body.rest + after) == (b"".join(chunks), True, b"next")
    assert relayed == wire[: -len(b"0\r\n\r\nnext")]


def test_clients_take_turns_and_keep_their_own_order() -> None:
    queue: FairQueue[str] = FairQueue(9)
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        assert queue.push(item[0], item) is None
    assert [queue.pop() for _ in range(7)] == ["a1", "b1", "c1", "a2", "c2", "a3", None]


@pytest.mark.parametrize(
    ("held", "item", "dropped"),
    [
        pytest.param(["a1", "a2", "a3"], "a4", "a4", id="the only client's own"),
        pytest.param(["a1", "a2", "a3"], "b1", "a3", id="the last of who has most"),
        pytest.param(["a1", "a2", "b1"], "b2", "b2", id="nobody has more than the newcomer would"),
        pytest.param(["a1", "b1", "c1"], "d1", "d1", id="everybody has one"),
    ],
)
def test_a_full_queue_takes_from_who_has_most(held: list[str], item: str, dropped: str) -> None:
    queue: FairQueue[str] = FairQueue(3)
    for earlier in held:
        queue.push(earlier[0], earlier)
    assert (queue.push(item[0], item), len(queue)) == (dropped, 3)
    assert dropped not in queue


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(0, 3)), max_size=60))
def test_a_queue_never_holds_more_than_it_may_and_loses_nothing(steps: list[tuple[str, int]]) -> None:
    queue: FairQueue[Any] = FairQueue(5)
    inside: set[Any] = set()
    for number, (what, client) in enumerate(steps):
        if what == "push":
            inside.add((client, number))
            inside.discard(queue.push(str(client), (client, number)))
        elif what == "pop":
            item = queue.pop()
            assert (item is None) == (not inside)
            inside.discard(item)
        elif inside:
            item = min(inside)
            queue.remove(str(item[0]), item)
            queue.remove(str(item[0]), item)
            inside.discard(item)
        assert len(queue) == len(inside) <= 5
        assert set(queue) == inside
