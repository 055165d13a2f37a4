"""What answers in etcd's place: whatever it says, the outcome is an EtcdError that names the reason."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from penstock.discovery.adapters.etcd_client import (
    AnswerTooLarge,
    EtcdClient,
    EtcdError,
    EtcdRefused,
    MemberFailed,
    prefix_end,
)
from penstock.discovery.adapters.etcd_listing import list_prefix
from penstock.discovery.etcd_table import Bounds
from penstock.discovery.etcd_wire import MAX_ANSWER_BYTES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PREFIX = b"p/"


class Server:
    """An HTTP server on a free port whose answer a test sets; `asked` holds the bodies of the requests."""

    def __init__(self) -> None:
        self.answer: Handler = said("{}")
        self.asked: list[dict[str, object]] = []
        self.address = ""
        self.ending = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(json.loads(await request.read()))
        answer = asyncio.ensure_future(self.answer(request))
        ending = asyncio.ensure_future(self.ending.wait())
        done, left = await asyncio.wait({answer, ending}, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        return answer.result() if answer in done else web.Response()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_post("/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    server.ending.set()
    await runner.cleanup()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[EtcdClient]:
    client = EtcdClient((server.address,), timeout_s=1.0)
    yield client
    await client.close()


def said(text: str | bytes, status: int = 200, content_type: str = "application/json") -> Handler:
    body = text.encode() if isinstance(text, str) else text

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={"Content-Type": content_type})

    return answer


def streamed(*pieces: bytes) -> Handler:
    """Pieces, then silence for as long as the client listens."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        await asyncio.Event().wait()
        return response

    return answer


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (said("{}"), "answers without a revision"),
        (said('{"header": {"revision": "-5"}}'), "answers without a revision"),
        (said("no JSON"), "not understood"),
        (said("[]"), "not understood"),
        (said(NESTED), "not understood"),
        (said(b"\xff\xfe"), "not understood"),
        (said('{"header": {"revision": "9"}, "kvs": [{"key": "no base64!"}]}'), "not understood"),
        (said('{"header": {"revision": "many"}}'), "not understood"),
        (said("{}", 500), "gRPC code 0"),
        (said("teapot\r\nx", 418, "text/plain"), "HTTP 418 teapot"),
        (said("", 404, "text/plain"), "--enable-grpc-gateway"),
        (said('{"code": 14, "message": "etcdserver: no leader"}', 503), "no leader"),
        (said('{"code": 7, "message": "etcdserver: permission denied"}', 403), "permission denied"),
        (said(b"x" * (MAX_ANSWER_BYTES + 1)), "more than"),
        (streamed(b'{"header"'), "no answer within 1 s"),
    ],
)
async def test_a_strange_answer_is_an_error_with_its_reason(
    server: Server, client: EtcdClient, answer: Handler, why: str
) -> None:
    server.answer = answer
    with pytest.raises(EtcdError) as caught:
        await list_prefix(client, PREFIX, Bounds())
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


async def test_a_redirect_is_not_followed(server: Server, client: EtcdClient) -> None:
    async def elsewhere(_: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(f"{server.address}/elsewhere")

    server.answer = elsewhere
    with pytest.raises(EtcdError, match="HTTP 307"):
        await list_prefix(client, PREFIX, Bounds())
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("pieces", "error", "why"),
    [
        ((b"x" * (MAX_ANSWER_BYTES // 2),) * 3, AnswerTooLarge, "a change has more than"),
        ((b"no JSON\n",), MemberFailed, "not understood"),
        (
            (b'{"result": {"canceled": true, "compact_revision": "7"}}\n',),
            EtcdRefused,
            "before 7 is compacted",
        ),
        ((b'{"result": {"canceled": true, "cancel_reason": "why\\nnot"}}\n',), EtcdRefused, "why?not"),
        ((b'{"error": {"grpc_code": 14, "message": "no leader"}}\n',), MemberFailed, "no leader"),
        ((b'{"error": {"code": 7, "message": "denied"}}\n',), EtcdRefused, "denied"),
    ],
)
async def test_a_strange_watch_ends_with_its_reason(
    server: Server, client: EtcdClient, pieces: tuple[bytes, ...], error: type[EtcdError], why: str
) -> None:
    server.answer = streamed(*pieces)

    async def read_on() -> None:
        async with client.watch(PREFIX, 1) as watch:
            while True:
                await watch.read()

    with pytest.raises(error) as caught:
        await read_on()
    assert why in str(caught.value)


async def test_a_watch_is_read_in_whole_lines_however_they_come(server: Server, client: EtcdClient) -> None:
    line = b'{"result": {"header": {"revision": "9"}, "events": [{"kv": {"key": "YQ=="}}]}}\n'
    server.answer = streamed(line[:10], line[10:] + line + line[:30], line[30:])
    keys: list[bytes] = []
    async with client.watch(PREFIX, 1) as watch:
        while len(keys) < 3:
            keys += [event.kv.key for answer in await watch.read() for event in answer.events]
    assert keys == [b"a"] * 3


async def test_a_server_that_repeats_a_page_for_ever_is_cut_off(server: Server, client: EtcdClient) -> None:
    key = base64.b64encode(b"p/a").decode()
    server.answer = said(json.dumps({"header": {"revision": "9"}, "kvs": [{"key": key}], "more": True}))
    listing = await list_prefix(client, PREFIX, Bounds(records=50))
    assert (len(listing.kvs), listing.cut) == (50, True)


async def test_pages_are_read_at_one_revision_and_shrink_while_they_are_too_large(
    server: Server, client: EtcdClient
) -> None:
    async def pages(_: web.Request) -> web.StreamResponse:
        asked = server.asked[-1]
        limit = int(str(asked["limit"]))
        first = base64.b64decode(str(asked["key"])) == PREFIX
        if limit > 2:
            return await said(b"x" * (MAX_ANSWER_BYTES + 1))(_)
        kvs = [{"key": base64.b64encode(b"p/a" if first else b"p/b").decode()}]
        return web.json_response({"header": {"revision": "9" if first else "12"}, "kvs": kvs, "more": first})

    server.answer = pages
    listing = await list_prefix(client, PREFIX, Bounds())
    assert [kv.key for kv in listing.kvs] == [b"p/a", b"p/b"]
    assert (listing.header.revision, listing.cut) == (9, False)
    assert [asked.get("revision") for asked in server.asked] == [None, None, None, 9, 9]


async def test_every_member_is_asked_and_named_when_none_answers(server: Server) -> None:
    client = EtcdClient(
        ("http://127.0.0.1:1", server.address, "http://127.0.0.1:2"),
        timeout_s=1.0,
    )
    server.answer = said('{"code": 14, "message": "no leader"}', 503)
    with pytest.raises(EtcdError) as caught:
        await list_prefix(client, PREFIX, Bounds())
    for part in ("127.0.0.1:1: connection refused", "no leader", "127.0.0.1:2: connection refused"):
        assert part in str(caught.value)
    server.answer = said('{"header": {"revision": "9"}}')
    assert (await list_prefix(client, PREFIX, Bounds())).header.revision == 9
    assert client.member == server.address
    await client.close()


async def test_a_password_is_in_no_error(server: Server) -> None:
    client = EtcdClient((server.address,), timeout_s=1.0, user="u", password="s3cret")
    server.answer = said('{"code": 3, "message": "authentication failed, invalid user ID or password"}', 400)
    with pytest.raises(EtcdRefused) as caught:
        await list_prefix(client, PREFIX, Bounds())
    assert "invalid user ID" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    await client.close()


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"p/", b"p0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"a\xff\xfe", b"a\xff\xff")]
)
def test_the_end_of_a_prefix_is_the_first_key_after_it(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end
