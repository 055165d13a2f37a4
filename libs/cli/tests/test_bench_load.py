"""The bench's load generator counts right answers only: against its responder, and against liars."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from penstock.cli.bench import loads
from penstock.cli.bench.attack import Attack
from penstock.cli.bench.clients import Address, ChatClient, Tally, connect
from penstock.cli.bench.cores import Cores
from penstock.cli.bench.responder import Connection
from penstock.cli.bench.way import Way
from penstock.cli.bench.window import Slot, Window
from penstock.cli.bench.wire import DONE, STREAM_END, STREAM_HEAD, Requests, answer, chunk, plan_in

HOST = "127.0.0.1"
Answer = Callable[[bytes, int], bytes]
Load = Callable[[Slot], Awaitable[object]]


@asynccontextmanager
async def responder() -> AsyncIterator[Address]:
    server = await asyncio.get_running_loop().create_server(Connection, HOST, 0)
    async with server:
        yield Address(HOST, server.sockets[0].getsockname()[1])


@asynccontextmanager
async def liar(answer: Answer) -> AsyncIterator[Address]:
    """Answers each request with `answer(nonce, chunks)`, and hangs up where that is empty."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.read(65536):
            nonce, chunks, _ = plan_in(request)
            said = answer(nonce, chunks)
            writer.write(said)
            if not said:
                break
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    async with server:
        yield Address(HOST, server.sockets[0].getsockname()[1])


def slot(address: Address, seconds: float = 0.05, mark: bytes = b"") -> Slot:
    cores = Cores(frozenset(), frozenset())
    way = Way("direct", [address], mark=mark)
    return Slot(way, seconds, Tally(mark), random.Random(1), cores, patience_s=0.5)


async def chats(slot: Slot) -> Window:
    return await loads.chats(slot, 1024, 2)


async def large_chats(slot: Slot) -> Window:
    return await loads.chats(slot, 16 * 1024, 2)


async def steady_chats(slot: Slot) -> Window:
    return await loads.steady_chats(slot, 1024, 500)


async def fast_streams(slot: Slot) -> Window:
    return await loads.fast_streams(slot, 1024, 2)


async def paced_streams(slot: Slot) -> Window:
    return await loads.paced_streams(slot, 1024, 2, 5)


@pytest.mark.parametrize("load", [chats, large_chats, steady_chats, fast_streams, paced_streams])
async def test_every_answer_of_the_responder_is_right(load: Callable[[Slot], Awaitable[Window]]) -> None:
    async with responder() as address:
        made = slot(address, seconds=0.1)
        window = await load(made)
    assert made.tally.failures == []
    assert window.done > 0
    assert window.rate > 0


async def test_times_are_taken_of_answers_and_of_the_chunks_of_paced_streams() -> None:
    async with responder() as address:
        for load in (chats, steady_chats, paced_streams):
            window = await load(slot(address, seconds=0.1))
            assert len(window.times_ns) == window.done
            assert 0 < window.percentile_us(50) <= window.percentile_us(100) < 5e6


async def test_streams_are_all_open_when_memory_is_read() -> None:
    async with responder() as address:
        made = slot(address)
        assert await loads.held_streams(made, 1024, 20, lambda: 42.0, pace_ms=100) == 42.0
    assert made.tally.failures == []
    assert (made.tally.heads, made.tally.done) == (20, 20 * loads.HELD_CHUNKS)


async def test_a_right_answer_that_came_another_way_is_a_stray() -> None:
    async with responder() as address:
        for load in (chats, fast_streams):
            for mark, strays in ((b"\r\nserver: uvicorn", False), (b"\r\nrouting-strategy: local", True)):
                made = slot(address, mark=mark)
                await load(made)
                assert made.tally.failures == []
                assert made.tally.strays == (made.tally.heads if strays else 0)


@pytest.mark.parametrize(
    ("lie", "failure"),
    [
        (lambda nonce, _: answer(nonce[::-1]), "another answer"),
        (lambda nonce, _: answer(nonce).replace(b"200 OK", b"503 No"), "another answer"),
        (lambda nonce, _: answer(nonce) + b"x", "another answer"),
        (lambda nonce, _: answer(nonce) * 2, "another answer"),
        (lambda nonce, _: answer(nonce)[:-1], "no whole answer"),
        (lambda nonce, _: answer(nonce)[:20], "no whole answer"),
        (lambda nonce, _: b"x" * 100_000, "another answer"),
        (lambda nonce, _: b"", "connection lost"),
    ],
)
async def test_a_chat_with_a_wrong_answer_has_failed(lie: Answer, failure: str) -> None:
    await expect_failures(chats, lie, failure)


def stream(nonce: bytes, numbers: list[int], end: bytes = STREAM_END) -> bytes:
    return STREAM_HEAD + b"".join(chunk(nonce, number, b"0" * 16) for number in numbers) + end


@pytest.mark.parametrize(
    ("lie", "failure"),
    [
        (lambda nonce, n: stream(nonce[::-1], [*range(n)]), "chunk 0 of 200 is another"),
        (lambda nonce, n: stream(nonce, [1, 0, *range(2, n)]), "chunk 0 of 200 is another"),
        (lambda nonce, n: stream(nonce, [0, 0, *range(2, n)]), "chunk 1 of 200 is another"),
        (lambda nonce, n: stream(nonce, [*range(n - 1)]), "ended after 199"),
        (lambda nonce, n: stream(nonce, [*range(n + 1)]), "more than 200 chunks"),
        (lambda nonce, n: stream(nonce, [*range(n)], b"0\r\n\r\n"), "ended after 200"),
        (lambda nonce, n: stream(nonce, [*range(n)], STREAM_END.replace(DONE[:10], b"data: done")), "ended"),
        (lambda nonce, n: stream(nonce, [*range(n)], STREAM_END[:-5]), "no whole answer"),
        (lambda nonce, n: stream(nonce, [*range(n)]) + b"more", "after the last chunk"),
        (lambda nonce, n: stream(nonce, [*range(n)]).replace(b"token 000007", b"token 7"), "its size says"),
        (lambda nonce, n: answer(nonce), "not a stream"),
        (lambda nonce, n: b"HTTP/1.1 503 No\r\n\r\n", "not a stream"),
        (lambda nonce, n: b"x" * 100_000, "not a stream"),
        (lambda nonce, n: b"", "connection lost"),
    ],
)
async def test_a_stream_with_anything_wrong_has_failed(lie: Answer, failure: str) -> None:
    await expect_failures(fast_streams, lie, failure)


async def expect_failures(load: Load, lie: Answer, failure: str) -> None:
    async with liar(lie) as address:
        made = slot(address)
        await load(made)
    assert made.tally.failed == len(made.tally.failures) == 2
    assert all(failure in text for text in made.tally.failures), made.tally.failures


async def test_requests_that_find_every_connection_busy_are_sent_as_soon_as_one_is_free() -> None:
    seen, all_busy = 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        while request := await reader.read(65536):
            seen += 1
            if seen == loads.OPEN_LOOP_CONNECTIONS:
                all_busy.set()
            await all_busy.wait()
            writer.write(answer(plan_in(request)[0]))
        writer.close()

    async with await asyncio.start_server(serve, HOST, 0) as server:
        made = slot(Address(HOST, server.sockets[0].getsockname()[1]), seconds=0.2)
        await loads.steady_chats(made, 1024, 2000)
    assert made.tally.failures == []
    assert made.tally.done == seen > loads.OPEN_LOOP_CONNECTIONS


async def test_the_time_of_a_request_that_had_to_wait_counts_from_when_it_was_due() -> None:
    tally, finished = Tally(), asyncio.Event()
    requests = iter(Requests(random.Random(1), 1024))
    async with responder() as address:
        [client] = await connect(lambda: ChatClient(tally, lambda _: finished.set()), [address], 1)
        client.ask(*next(requests), due_ns=1)
        async with asyncio.timeout(30):
            await finished.wait()
        now_ns = time.monotonic_ns()
        client.close()
    assert 0 <= now_ns - tally.times_ns[0] < 5_000_000_000


@pytest.mark.parametrize(
    ("head", "statuses", "failures"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", {"200"}, 0),
        (b"HTTP/1.1 400 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", {"400"}, 0),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", {"500"}, 1),
        (b"HTTP/1.1 200 OK\r\n\r\n", set(), 1),
        (b"", set(), 1),
    ],
)
async def test_an_attack_takes_any_defined_answer_and_no_silence(
    head: bytes, statuses: set[str], failures: int
) -> None:
    async with liar(lambda nonce, chunks: head) as address:
        tally = Tally()
        attack = Attack(address, b"{}", "", tally)
        async with asyncio.timeout(30), loads.beside(attack.run(), "attack"):
            while not attack.statuses and not tally.failed:  # noqa: ASYNC110  # either may come first
                await asyncio.sleep(0)
    assert set(attack.statuses) == statuses
    assert bool(tally.failed) == bool(failures)
