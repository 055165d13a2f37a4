"""Clients that leave, read slowly, send too fast: they cost nobody but themselves."""

import asyncio
import hashlib
import itertools
from collections.abc import Callable

import pytest
from integration.servers import eventually

from penstock.ingress.adapters.client_connection import ClientConnection

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, STREAM_BODY, Engine, Lab, Peer

HEALTH = b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n"
POST_HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(params=["close", "reset"])
def leave(request: pytest.FixtureRequest) -> str:
    """How a client goes."""
    name: str = request.param
    return name


# -- leaving -------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_while_it_is_placed_gets_its_placement_released(
    lab: Lab, engine: Engine, leave: str
) -> None:
    lab.bus.open.clear()
    client = await lab.client()
    client.post()
    await eventually(lambda: lab.scheduler.placed)
    getattr(client, leave)()
    await eventually(lambda: not lab.gateway.exchanges)
    assert not lab.released
    lab.bus.open.set()
    await eventually(lab.reports)
    assert lab.released == lab.scheduler.placed
    outcome = await lab.outcome()
    assert outcome["outcome"] == "client_gone"
    assert outcome["decisions"] == list(lab.released)
    assert engine.connections == 0


async def test_a_client_that_leaves_while_its_instance_is_connected_sends_nothing_there(
    lab: Lab, deaf_port: int, leave: str
) -> None:
    lab.instance("e1", deaf_port)
    client = await lab.client()
    client.post()
    await eventually(lambda: len(lab.account) == 1)
    getattr(client, leave)()
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"]) == ("client_gone", 0)


async def test_a_client_that_leaves_while_it_waits_cancels_the_work(
    lab: Lab, engine: Engine, leave: str
) -> None:
    client, peer = await lab.exchange(engine)
    getattr(client, leave)()
    await peer.gone()
    assert (await lab.outcome())["outcome"] == "client_gone"


async def test_a_client_that_leaves_during_a_stream_cancels_the_work(
    lab: Lab, engine: Engine, leave: str
) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    wire = peer.event("one")
    await client.until(wire)
    getattr(client, leave)()
    await peer.gone()
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"], outcome["chunks"]) == ("client_gone", 200, 1)


async def test_a_client_that_leaves_during_a_plain_response_cancels_the_work(
    lab: Lab, engine: Engine, leave: str
) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(LENGTH % 10 + b"half.")
    await client.until(b"half.")
    getattr(client, leave)()
    await peer.gone()
    assert (await lab.outcome())["outcome"] == "client_gone"


async def test_a_client_that_closes_its_sending_side_has_left(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    client.writer.write_eof()
    await peer.gone()
    assert await client.rest() == b""
    assert (await lab.outcome())["outcome"] == "client_gone"


async def test_a_client_that_closes_its_sending_side_and_does_not_read_has_left_too(
    lab_of: LabOf,
) -> None:
    lab = await lab_of(idle_timeout=0.3)
    engine = await lab.engine(send_buffer=65536)
    client = await lab.client(receive_buffer=16384)
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    await stall(peer, await other_pair(lab))
    client.writer.write_eof()
    await peer.gone()
    assert [outcome["outcome"] for outcome in await lab.settled()].count("client_gone") == 1
    # What it does not read is not kept for it for ever.
    await eventually(lambda: not lab.server.connections)


async def test_a_request_behind_another_is_not_begun_for_a_client_that_left(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post()
    peer = await engine.accept()
    await peer.request()
    client.post()
    client.reset()
    await peer.gone()
    outcome = await lab.outcome()
    assert outcome["outcome"] == "client_gone"
    assert len(lab.scheduler.requests) == 1


async def test_a_request_whose_turn_comes_after_its_client_left_is_not_begun(lab: Lab) -> None:
    connection, transport = connected(lab)
    # What the loop may do in one turn: the first request is answered, the second waits, the client leaves.
    connection.data_received(HEALTH + POST_HEAD + BODY)
    assert transport.written.endswith(b'{"status":"ok"}')
    connection.connection_lost(None)
    await turn()
    assert not lab.gateway.exchanges
    assert await lab.settled() == []


# -- reading slowly ------------------------------------------------------------------------------------


async def other_pair(lab: Lab) -> tuple[Peer, Peer]:
    """Another client, and the end of its instance, which serves another model."""
    engine = await lab.engine("other", models=("other",))
    client = await lab.client()
    client.post(BODY.replace(b'"m"', b'"other"'))
    peer = await engine.accept()
    await peer.request()
    peer.answer(b"0")
    await client.response()
    return client, peer


async def ask_other(other: tuple[Peer, Peer], times: int) -> None:
    """Serve another client that often: whatever else can go on in the meantime does."""
    client, peer = other
    for number in range(times):
        client.post(BODY.replace(b'"m"', b'"other"'))
        await peer.request()
        peer.answer(b"%d" % number)
        assert (await client.response()).body == b"%d" % number


async def steady(count: Callable[[], int], other: tuple[Peer, Peer]) -> int:
    """A number once it grows no more while another client is served."""
    last = -1
    while (number := count()) != last:
        last = number
        await ask_other(other, 50)
    return number


def engine_requests(lab: Lab, model: str) -> int:
    return sum(request.model == model for request in lab.scheduler.requests)


async def stall(peer: Peer, other: tuple[Peer, Peer]) -> tuple[int, bytes]:
    """Send on `peer` until nothing goes out any more; bytes sent and their digest."""
    sent, digest = 0, hashlib.sha256()
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    peer.begin_stream()
    for _ in range(2000):
        while not peer.writer.transport.get_write_buffer_size():
            peer.send(piece)
            digest.update(piece)
            sent += len(piece)
        if await steady(peer.writer.transport.get_write_buffer_size, other):
            return sent, digest.digest()
    raise AssertionError(f"{sent} bytes were taken")


async def test_a_slow_reader_pauses_its_own_upstream_and_nobody_elses(lab: Lab) -> None:
    engine = await lab.engine(send_buffer=65536)
    client = await lab.client(receive_buffer=16384)
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    sent, digest = await stall(peer, await other_pair(lab))
    # The kernel's buffers on the way, and a bounded one of the ingress.
    assert sent < 24 * 2**20
    peer.send(b"0\r\n\r\n")
    await client.head()
    received = await client.exactly(sent)
    assert hashlib.sha256(received).digest() == digest
    assert await client.exactly(5) == b"0\r\n\r\n"
    assert [outcome["outcome"] for outcome in await lab.settled()].count("completed") > 20


async def test_what_an_instance_sent_before_it_closed_reaches_a_slow_reader(lab: Lab) -> None:
    engine = await lab.engine(send_buffer=65536)
    client = await lab.client(receive_buffer=16384)
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    sent, digest = await stall(peer, await other_pair(lab))
    peer.send(b"0\r\n\r\n")
    peer.close()
    await client.head()
    assert hashlib.sha256(await client.exactly(sent)).digest() == digest
    assert await client.exactly(5) == b"0\r\n\r\n"


async def test_a_client_that_stops_reading_for_good_is_ended(lab_of: LabOf) -> None:
    lab = await lab_of(stream_idle_timeout=0.5, idle_timeout=0.2)
    engine = await lab.engine(send_buffer=65536)
    client = await lab.client(receive_buffer=16384)
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    peer.begin_stream()
    for _ in range(2000):
        peer.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    await peer.gone()
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["error"]) == ("timed_out", "the client read nothing for 0.5 s")
    await eventually(lambda: not lab.server.connections)


async def test_a_client_that_sends_requests_without_reading_is_not_answered_beyond_a_bound(
    lab: Lab, engine: Engine
) -> None:
    total, body = 200, b"x" * 200_000
    client = await lab.client(receive_buffer=16384)
    for _ in range(total):
        client.post()
    peer = await engine.accept()

    async def serve() -> None:
        for _ in range(total):
            await peer.request()
            peer.answer(body)

    other = await other_pair(lab)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(), name="engine")
        begun = await steady(lambda: engine_requests(lab, "m"), other)
        assert begun < total // 2
        for _ in range(total):
            assert (await client.response()).body == body


class ClientTransport(asyncio.Transport):
    """A client's socket of which the test decides whether its send buffer is full."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.aborted = b"", False
        self.on_write: Callable[[], object] = bool

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        self.on_write()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.aborted = True


def connected(lab: Lab) -> tuple[ClientConnection, ClientTransport]:
    """A client's connection whose callbacks the test calls in the loop's stead."""
    connection, transport = ClientConnection(lab.server, lab.gateway), ClientTransport()
    connection.connection_made(transport)
    return connection, transport


async def turn() -> None:
    """One turn of the loop."""
    await asyncio.sleep(0)


async def test_a_request_whose_interim_response_fills_the_buffer_waits(lab: Lab, engine: Engine) -> None:
    connection, transport = connected(lab)
    transport.on_write = connection.pause_writing
    connection.data_received(POST_HEAD.replace(b"host", b"expect: 100-continue\r\nhost"))
    assert transport.written.startswith(b"HTTP/1.1 100 ")
    connection.data_received(BODY)
    assert not lab.gateway.exchanges
    connection.resume_writing()
    peer = await engine.accept()
    assert (await peer.request())[2] == BODY
    connection.connection_lost(None)
    await peer.gone()
    assert (await lab.outcome())["outcome"] == "client_gone"


async def test_a_request_after_a_response_that_fills_the_buffer_waits(lab: Lab, engine: Engine) -> None:
    connection, transport = connected(lab)
    transport.on_write = connection.pause_writing
    connection.data_received(POST_HEAD + BODY)
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    await lab.settled()
    connection.data_received(POST_HEAD + BODY)
    assert not lab.gateway.exchanges
    connection.resume_writing()
    await turn()
    assert len(lab.gateway.exchanges) == 1
    connection.connection_lost(None)


async def test_a_request_whose_turn_comes_while_its_client_does_not_read_waits(
    lab: Lab, engine: Engine
) -> None:
    connection, _ = connected(lab)
    connection.data_received(HEALTH + POST_HEAD + BODY)
    connection.pause_writing()
    await turn()
    assert not lab.gateway.exchanges
    connection.resume_writing()
    await turn()
    assert len(lab.gateway.exchanges) == 1
    connection.connection_lost(None)


async def test_a_client_that_never_reads_is_not_told_that_its_next_request_came_late(lab: Lab) -> None:
    connection, transport = connected(lab)
    connection.data_received(HEALTH + POST_HEAD + BODY)
    connection.pause_writing()
    connection.expire()
    assert transport.aborted
    assert b"408" not in transport.written
    connection.connection_lost(None)


async def test_a_client_that_reads_again_before_its_turn_comes_gets_one_request_at_a_time(
    lab: Lab, engine: Engine
) -> None:
    connection, _ = connected(lab)
    connection.data_received(HEALTH + (POST_HEAD + BODY) * 2)
    connection.pause_writing()
    connection.resume_writing()
    await turn()
    assert len(lab.gateway.exchanges) == 1
    connection.connection_lost(None)


# -- sending fast --------------------------------------------------------------------------------------


async def test_requests_on_one_connection_are_answered_in_their_order(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(b'{"model":"m","messages":[1]}')
    client.send(HEALTH)
    client.post(b'{"model":"none","messages":[2]}')
    client.post(b'{"model":"m","messages":[3]}')
    client.send(HEALTH)
    peer = await engine.accept()
    assert (await peer.request())[2].endswith(b"[1]}")
    peer.begin_stream()
    peer.event("first")
    peer.send(b"0\r\n\r\n")
    assert (await client.response()).body == b"data: first\n\n"
    assert (await client.response()).body == b'{"status":"ok"}'
    assert (await client.response()).status == 404
    assert (await peer.request())[2].endswith(b"[3]}")
    peer.answer(b"third")
    assert (await client.response()).body == b"third"
    assert (await client.response()).body == b'{"status":"ok"}'


async def test_a_request_sent_during_a_stream_waits_for_its_end(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.head()
    client.send(HEALTH)
    for number in range(3):
        wire = peer.event(str(number))
        assert await client.exactly(len(wire)) == wire
    peer.send(b"0\r\n\r\n")
    assert await client.exactly(5) == b"0\r\n\r\n"
    assert (await client.response()).body == b'{"status":"ok"}'


async def test_a_thousand_requests_in_one_piece_are_all_answered(lab: Lab) -> None:
    client = await lab.client()
    client.send(HEALTH * 1000)
    for _ in range(1000):
        assert (await client.response()).status == 200


async def test_a_flood_of_requests_is_read_no_faster_than_it_is_answered(lab: Lab) -> None:
    client = await lab.client(receive_buffer=16384)
    flood = HEALTH * (32 * 2**20 // len(HEALTH))
    client.send(flood)
    other = await lab.client()
    for _ in itertools.repeat(None, 300):
        other.send(HEALTH)
        assert (await other.response()).status == 200
    # Kernel buffers apart, what is not answered is still with the client.
    assert client.writer.transport.get_write_buffer_size() > len(flood) // 2
    client.reset()


async def test_requests_beyond_the_bound_wait_in_the_clients_kernel_while_one_is_served(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    flood = HEALTH * (32 * 2**20 // len(HEALTH))
    client.send(flood)
    other = await lab.client()
    for _ in itertools.repeat(None, 50):
        other.send(HEALTH)
        assert (await other.response()).status == 200
    assert client.writer.transport.get_write_buffer_size() > len(flood) // 2
    peer.answer(b"first")
    assert (await client.response()).body == b"first"
    for _ in range(2000):
        assert (await client.response()).status == 200
    assert client.writer.transport.get_write_buffer_size() > len(flood) // 2
    client.reset()


async def test_a_request_larger_than_the_bound_can_follow_another(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    large = b'{"model":"m","messages":["' + b"x" * 2_000_000 + b'"]}'
    client.post(large)
    client.send(HEALTH)
    peer.answer(b"first")
    assert (await client.response()).body == b"first"
    assert (await peer.request())[2] == large
    peer.answer(b"second")
    assert (await client.response()).body == b"second"
    assert (await client.response()).status == 200
