"""The bridge over real sockets: a publisher as engines have one, and others that are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.block_hash import pack_tokens, root_seed, token_chain
from penstock.common.messages import KvEvents
from penstock.common.model import Endpoint, Instance
from penstock.common.subjects import KV
from penstock.common.telemetry import Metrics
from penstock.discovery.adapters.zmq_events import MAX_FRAME_BYTES, zmq_publishers
from penstock.discovery.allowed import AllowedHosts, parse_allowed
from penstock.discovery.instruments import Instruments
from penstock.discovery.kv_bridging import Bridging
from penstock.discovery.kv_policy import KvPolicy
from penstock.scheduler.kv_feeds import KvFeeds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.sim.kv_log import KvEncoding, KvLog
from penstock.sim.kv_publisher import KvPublisher
from penstock.sim.spec import EngineRequest

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
SIZE, SECRET = 2, "secret"
HOST = "127.0.0.1"


class Engine:
    """The events of an engine, made by hand: prompts of token ids, two a block."""

    def __init__(self, encoding: KvEncoding = "vllm") -> None:
        self.publisher = KvPublisher(KvLog(SIZE), encoding, SIZE, host=HOST, port=0, replay_port=0)
        self.publisher.start()

    def _request(self, ids: Sequence[int]) -> EngineRequest:
        tokens = pack_tokens(ids)
        hashes = tuple(token_chain(tokens, 77, SIZE, 1000))
        return EngineRequest("r", len(ids), 1, hashes, tokens=tokens)

    def store(self, ids: Sequence[int], first: int = 0) -> None:
        """The blocks of a prompt from number `first` on."""
        request = self._request(ids)
        for place in range(first, len(request.block_hashes)):
            self.publisher.log.stored(request, place)
        self.publisher.flush()

    def remove(self, ids: Sequence[int]) -> None:
        self.publisher.log.removed(self._request(ids).block_hashes[-1])
        self.publisher.flush()

    def clear(self) -> None:
        self.publisher.log.cleared()
        self.publisher.flush()


class Bridge:
    """A bridge between publishers and the prefix index of a scheduler."""

    def __init__(self, bus: MemoryBus, bridging: Bridging, metrics: Metrics) -> None:
        self.bus, self.bridging, self._metrics = bus, bridging, metrics
        self.index = PrefixIndex(10_000)
        self.feeds = KvFeeds(self.index, {"e": 0, "f": 1}.get)
        self.holds = True

    def follow(self, *targets: tuple[str, int, int]) -> None:
        """(instance, port of events, port of replays)."""
        labels = "penstock/kv-events", "penstock/kv-events-replay"
        self.bridging.keep(
            Instance(
                id=name,
                endpoint=Endpoint(HOST, 1),
                models=("m",),
                labels={label: str(port) for label, port in zip(labels, ports, strict=True) if port},
            )
            for name, *ports in targets
        )

    def take(self, events: KvEvents) -> None:
        self.feeds.take(events)

    def matched(self, ids: Sequence[int], slot: int = 0) -> int:
        packed = token_chain(pack_tokens(ids), root_seed(SECRET, "m"), SIZE, 1000)
        steps = self.index.match([one >> 4 for one in packed], 1 << slot)
        return steps[-1][0] if steps else 0

    def batches(self, result: str) -> float:
        return self._metrics.counter("penstock_discovery_kv_batches_total", "").labels(result).value


@asynccontextmanager
async def bridge(*, blocks: bool = True, allowed: AllowedHosts | None = None) -> AsyncIterator[Bridge]:
    """Between a memory bus and whatever it is told to follow."""
    bus, metrics = MemoryBus(MemoryBroker()), Metrics()
    policy = KvPolicy(blocks=blocks, block_size=SIZE, secret=SECRET)
    with zmq_publishers(allowed or AllowedHosts()) as publishers:
        made: list[Bridge] = []
        bridging = Bridging(publishers, bus, policy, lambda: made[0].holds, Instruments(metrics))
        made.append(Bridge(bus, bridging, metrics))
        await bus.subscribe(KV, made[0].take)
        running = asyncio.create_task(bridging.run(), name="bridging")
        try:
            yield made[0]
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.wait([running])


@asynccontextmanager
async def engine(encoding: KvEncoding = "vllm") -> AsyncIterator[Engine]:
    one = Engine(encoding)
    try:
        yield one
    finally:
        await one.publisher.stop()


async def heard(one: Bridge, publishing: Engine, eventually: Eventually) -> None:
    """Publish until the bridge hears, as its subscription takes a moment to arrive."""
    number = 1000

    def publish() -> bool:
        nonlocal number
        number += 1
        publishing.store([number, number])
        return one.matched([number - 1, number - 1]) == 1

    await eventually(publish)


@pytest.mark.parametrize("encoding", ["vllm", "vllm-bytes", "sglang"])
async def test_a_scheduler_learns_what_an_engine_stored_evicted_and_cleared(
    encoding: KvEncoding, eventually: Eventually
) -> None:
    async with engine(encoding) as publishing, bridge() as one:
        # Published before anybody listened: only the replay has it.
        publishing.store([1, 2, 3, 4])
        one.follow(("e", publishing.publisher.port, publishing.publisher.replay_port))
        await heard(one, publishing, eventually)
        assert one.matched([1, 2, 3, 4, 5, 6]) == 2
        publishing.store([1, 2, 3, 4, 5, 6], first=2)
        await eventually(lambda: one.matched([1, 2, 3, 4, 5, 6]) == 3)
        publishing.remove([1, 2, 3, 4, 5, 6])
        await eventually(lambda: one.matched([1, 2, 3, 4, 5, 6]) == 2)
        publishing.clear()
        await eventually(lambda: one.matched([1, 2, 3, 4]) == 0)
        assert one.feeds.results["gap"] == 0


async def test_missed_messages_are_asked_for_again(eventually: Eventually) -> None:
    async with engine() as publishing, bridge() as one:
        one.follow(("e", publishing.publisher.port, publishing.publisher.replay_port))
        await heard(one, publishing, eventually)
        publishing.publisher.lose(2, for_good=False)
        publishing.store([1, 2])
        publishing.store([3, 4])
        publishing.store([5, 6])
        await eventually(lambda: one.matched([5, 6]) == 1)
        assert (one.matched([1, 2]), one.matched([3, 4])) == (1, 1)
        assert one.feeds.results["gap"] == 0
        assert one.batches("lost") == 0


async def test_what_cannot_be_replayed_makes_the_instance_unknown(eventually: Eventually) -> None:
    async with engine() as publishing, bridge() as one:
        one.follow(("e", publishing.publisher.port, publishing.publisher.replay_port))
        await heard(one, publishing, eventually)
        publishing.store([1, 2])
        await eventually(lambda: one.matched([1, 2]) == 1)
        publishing.publisher.lose(1, for_good=True)
        publishing.store([3, 4])
        publishing.store([5, 6])
        await eventually(lambda: one.matched([5, 6]) == 1)
        assert (one.matched([1, 2]), one.matched([3, 4])) == (0, 0)
        assert one.batches("lost") == 1


async def test_an_engine_that_starts_anew_has_an_empty_cache(eventually: Eventually) -> None:
    async with engine() as publishing, bridge() as one:
        one.follow(("e", publishing.publisher.port, publishing.publisher.replay_port))
        await heard(one, publishing, eventually)
        publishing.store([1, 2])
        await eventually(lambda: one.matched([1, 2]) == 1)
        publishing.publisher.restart()
        publishing.store([3, 4])
        await eventually(lambda: one.matched([3, 4]) == 1)
        assert one.matched([1, 2]) == 0


async def test_after_the_bus_was_lost_everything_is_announced_again(eventually: Eventually) -> None:
    async with engine() as publishing, bridge() as one:
        one.follow(("e", publishing.publisher.port, publishing.publisher.replay_port))
        await heard(one, publishing, eventually)
        one.holds = False
        before = one.batches("applied")
        publishing.store([1, 2])
        await eventually(lambda: one.batches("applied") > before)
        one.bridging._connection(False)
        one.holds = True
        publishing.store([3, 4])
        await eventually(lambda: one.matched([1, 2]) == one.matched([3, 4]) == 1)


async def test_without_a_tokenizer_a_cleared_cache_is_all_that_is_said(eventually: Eventually) -> None:
    async with engine() as publishing, bridge(blocks=False) as one:
        one.follow(("e", publishing.publisher.port, 0))
        one.index.insert([1, 2, 3], 0)

        def clear() -> bool:
            publishing.store([7, 8])
            publishing.clear()
            return not one.index.match([1], 1)

        await eventually(clear)
        assert one.matched([7, 8]) == 0


async def test_only_who_holds_the_lease_speaks(eventually: Eventually) -> None:
    async with engine() as publishing, bridge() as one:
        one.holds = False
        one.follow(("e", publishing.publisher.port, publishing.publisher.replay_port))

        def publish() -> bool:
            publishing.store([1, 2])
            return one.batches("applied") > 0

        await eventually(publish)
        assert sum(one.feeds.results.values()) == 0


async def test_a_publisher_where_no_instance_may_be_is_not_connected_to(eventually: Eventually) -> None:
    async with engine() as publishing, bridge(allowed=parse_allowed("10.0.0.0/8")) as one:
        one.follow(("e", publishing.publisher.port, 0))
        await eventually(lambda: len(one.bridging) == 1)
        for number in range(20):
            publishing.store([number, number])
            await asyncio.sleep(0)
        assert one.batches("applied") == 0


HOSTILE: list[list[bytes]] = [
    [b""],
    [b"topic", b"short", b""],
    [b"topic", bytes(8), b"\xc1" * 100],
    [b"topic", b"\xff" * 8, b"\x93\x00\x90\xc0"],
    [b"topic", bytes(8), b"\x93\x00\xdd\xff\xff\xff\xff"],
    [b"x"] * 100,
    [b"topic", bytes(8), b"\x91" * 100_000],
    [b"topic", bytes(8), bytes(MAX_FRAME_BYTES + 1)],
]


@pytest.mark.parametrize("place", range(len(HOSTILE)))
async def test_a_hostile_publisher_harms_only_its_own_feed(place: int, eventually: Eventually) -> None:
    context = zmq.asyncio.Context()
    hostile = context.socket(zmq.PUB)
    port = hostile.bind_to_random_port(f"tcp://{HOST}")
    sending = asyncio.Event()

    async def send() -> None:
        while True:
            await hostile.send_multipart(HOSTILE[place])
            sending.set()
            await asyncio.sleep(0)

    flood = asyncio.create_task(send(), name="flood")
    try:
        async with engine() as publishing, bridge() as one:
            one.follow(("f", port, port), ("e", publishing.publisher.port, publishing.publisher.replay_port))
            await heard(one, publishing, eventually)
            await sending.wait()
            publishing.store([1, 2])
            await eventually(lambda: one.matched([1, 2]) == 1)
            assert one.matched([1, 2], slot=1) == 0
    finally:
        flood.cancel()
        await asyncio.wait([flood])
        context.destroy(linger=0)
