"""A feed from engine to schedulers: what they hold at its end is what the engine holds, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.block_hash import pack_tokens, root_seed, token_chain
from penstock.common.codec import encode
from penstock.common.messages import MAX_KV_CHANGES, KvEvents
from penstock.common.model import Endpoint, Instance
from penstock.common.subjects import KV
from penstock.discovery.kv_blocks import KvBlocks
from penstock.discovery.kv_events import BlockRemoved, BlockStored, KvEventError
from penstock.discovery.kv_feed import KvFeed, Next
from penstock.discovery.kv_targets import KvTarget, target_of
from penstock.scheduler.chain import unpack
from penstock.scheduler.kv_feeds import KvFeeds
from penstock.scheduler.prefix_index import PrefixIndex

SIZE, SECRET, MODEL = 2, "s", "m"


def seed(model: str, salt: str) -> int:
    return root_seed(SECRET, model, salt)


def blocks(most: int = 1000, models: tuple[str, ...] = (MODEL,)) -> KvBlocks:
    return KvBlocks(models, SIZE, most, seed)


def gateway(tokens: Iterable[int], model: str = MODEL, salt: str = "") -> list[int]:
    """The hashes that an ingress makes of a prompt."""
    return token_chain(pack_tokens(list(tokens)), seed(model, salt), SIZE, 2048)


def feed(held: KvBlocks | None) -> KvFeed:
    names = itertools.count()
    return KvFeed("e", held, lambda: f"f{next(names)}")


def batch(*events: object) -> bytes:
    return msgspec.msgpack.encode([0.0, list(events), None])


def stored(keys: list[int], parent: int | None, tokens: list[int]) -> list[object]:
    return ["BlockStored", keys, parent, tokens, SIZE, None]


class Scheduler:
    """The prefix index of a scheduler, fed by the messages."""

    def __init__(self) -> None:
        self.index = PrefixIndex(10_000)
        self.feeds = KvFeeds(self.index, lambda _: 0)

    def take(self, messages: Iterable[KvEvents]) -> None:
        for message in messages:
            self.feeds.take(message)

    def holds(self, hashes: list[int]) -> int:
        short = unpack(np.array(hashes, dtype="<u8").tobytes())
        steps = self.index.match(short, 1)
        return steps[-1][0] if steps else 0


def test_a_stored_prompt_matches_what_the_ingress_hashes_and_a_removed_one_no_longer() -> None:
    held = blocks()
    assert held.store(BlockStored((1, 2), None, (10, 11, 12, 13), SIZE)) == [gateway([10, 11, 12, 13])]
    assert held.store(BlockStored((3,), 2, (14, 15), SIZE)) == [gateway([10, 11, 12, 13, 14, 15])[2:]]
    assert held.store(BlockStored((3,), 2, (14, 15), SIZE)) == []
    assert held.remove(BlockRemoved((3,))) == gateway([10, 11, 12, 13, 14, 15])[2:]
    assert held.remove(BlockRemoved((1,))) == gateway([10, 11, 12, 13])[::-1]
    assert len(held) == 0


def test_salt_adapter_and_every_name_of_the_model_make_chains_of_their_own() -> None:
    held = blocks(models=("m", "alias"))
    assert held.store(BlockStored((1,), None, (1, 2), SIZE)) == [
        gateway([1, 2], "m"),
        gateway([1, 2], "alias"),
    ]
    assert held.store(BlockStored((2,), None, (1, 2), SIZE, adapter="lora")) == [gateway([1, 2], "lora")]
    salted = [gateway([1, 2], "m", "x"), gateway([1, 2], "alias", "x")]
    assert held.store(BlockStored((3,), None, (1, 2), SIZE, salt="x")) == salted


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (BlockStored((1,), None, (1, 2, 3), 3), "block_size"),
        (BlockStored((1,), 9, (1, 2), SIZE), "unknown_parent"),
        (BlockStored((1,), None, (1, 2), SIZE, whole=False), "not_tokens"),
    ],
)
def test_what_cannot_be_matched_is_passed_over(event: BlockStored, why: str) -> None:
    held = blocks()
    assert held.store(event) == []
    assert held.passed_over == {why: 1}
    assert len(held) == 0


def test_at_its_bound_it_follows_no_further_blocks_until_some_go() -> None:
    held = blocks(most=2)
    assert held.store(BlockStored((1, 2, 3), None, (1, 2, 3, 4, 5, 6), SIZE)) == [
        gateway([1, 2, 3, 4, 5, 6])[:2]
    ]
    assert held.passed_over == {"too_many": 1}
    held.remove(BlockRemoved((2,)))
    assert held.store(BlockStored((9,), None, (7, 8), SIZE)) == [gateway([7, 8])]


def test_a_first_hearing_with_the_whole_history_replaces_what_schedulers_hold() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    history = [batch(stored([1], None, [1, 2])), batch(stored([2], 1, [3, 4]), ["BlockRemoved", [2]])]
    assert one.see(2) is Next.RECOVER
    assert one.missing_from == 0
    scheduler.take(one.recovered(list(enumerate(history)), 2, batch(stored([3], 1, [5, 6]))))
    assert scheduler.holds(gateway([1, 2, 5, 6])) == 2
    assert scheduler.holds(gateway([1, 2, 3, 4])) == 1
    assert scheduler.feeds.results["cleared"] == 1


def test_a_first_hearing_in_the_middle_leaves_what_schedulers_hold() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    prompt = gateway([1, 2])
    scheduler.index.insert(unpack(np.array(prompt, dtype="<u8").tobytes()), 0)
    assert one.see(7) is Next.RECOVER
    scheduler.take(one.recovered([], 7, batch(stored([2], None, [3, 4]))))
    assert scheduler.holds(prompt) == 1
    assert scheduler.holds(gateway([3, 4])) == 1


def hear(one: KvFeed, scheduler: Scheduler, sequence: int, payload: bytes, kept: dict[int, bytes]) -> None:
    """One message, as the bridge handles it; `kept` is what the engine sends again."""
    try:
        match one.see(sequence):
            case Next.APPLY:
                scheduler.take(one.apply(sequence, payload))
            case Next.RECOVER:
                again = sorted((n, p) for n, p in kept.items() if n >= one.missing_from)
                scheduler.take(one.recovered(again, sequence, payload))
    except KvEventError:
        scheduler.take(one.unknown())


def test_a_gap_that_is_replayed_costs_nothing_and_repeats_are_skipped() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    payloads = [batch(stored([n + 1], n or None, [n, n])) for n in range(5)]
    hear(one, scheduler, 0, payloads[0], {})
    # What is published while the replay comes is part of it, and heard once more.
    for sequence in (2, 3, 4):
        hear(one, scheduler, sequence, payloads[sequence], dict(enumerate(payloads[:4])))
    assert scheduler.holds(gateway([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])) == 5
    assert (one.gaps, one.lost, scheduler.feeds.results["gap"]) == (1, 0, 0)


def test_a_gap_that_is_not_replayed_makes_the_instance_unknown() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    hear(one, scheduler, 0, batch(stored([1], None, [1, 2])), {})
    assert scheduler.holds(gateway([1, 2])) == 1
    hear(one, scheduler, 2, batch(stored([3], None, [3, 4])), {})
    assert scheduler.holds(gateway([1, 2])) == 0
    assert scheduler.holds(gateway([3, 4])) == 1
    assert one.lost == 1


def test_an_engine_that_starts_anew_has_an_empty_cache() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    hear(one, scheduler, 0, batch(stored([1], None, [1, 2])), {})
    hear(one, scheduler, 1, batch(stored([2], None, [3, 4])), {})
    hear(one, scheduler, 0, batch(stored([3], None, [5, 6])), {})
    assert (scheduler.holds(gateway([1, 2])), scheduler.holds(gateway([5, 6]))) == (0, 1)
    assert one.restarts == 1


def test_after_a_lost_connection_another_life_is_not_taken_for_the_next_messages() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    hear(one, scheduler, 0, batch(stored([1], None, [1, 2])), {})
    one.doubt()
    # The process was started anew and has published one message that was not heard.
    hear(one, scheduler, 1, batch(stored([3], None, [5, 6])), {0: batch(stored([2], None, [3, 4]))})
    assert [scheduler.holds(gateway(ids)) for ids in ([1, 2], [3, 4], [5, 6])] == [0, 1, 1]


def test_a_batch_that_cannot_be_read_makes_the_instance_unknown_and_the_next_ones_count() -> None:
    one, scheduler = feed(blocks()), Scheduler()
    hear(one, scheduler, 0, batch(stored([1], None, [1, 2])), {})
    hear(one, scheduler, 1, b"\xc1", {})
    assert scheduler.holds(gateway([1, 2])) == 0
    hear(one, scheduler, 2, batch(stored([2], None, [3, 4])), {})
    assert scheduler.holds(gateway([3, 4])) == 1


def test_without_a_tokenizer_schedulers_hear_of_empty_caches_only() -> None:
    one, scheduler = feed(None), Scheduler()
    prompt = gateway([1, 2])
    known = unpack(np.array(prompt, dtype="<u8").tobytes())
    scheduler.index.insert(known, 0)
    hear(one, scheduler, 0, batch(stored([1], None, [1, 2])), {})
    hear(one, scheduler, 1, batch(["BlockRemoved", [1]]), {})
    assert scheduler.holds(prompt) == 1
    hear(one, scheduler, 2, batch(["AllBlocksCleared"]), {})
    assert scheduler.holds(prompt) == 0


def test_messages_keep_the_bounds_of_the_wire() -> None:
    one = feed(blocks(most=100_000))
    tokens = list(range(2 * 40_000))
    one.see(0)
    messages = list(one.recovered([], 0, batch(stored(list(range(1, 40_001)), None, tokens))))
    assert sum(len(change.hashes) for message in messages for change in message.changes) == 8 * 40_000
    assert all(len(message.changes) <= MAX_KV_CHANGES for message in messages)
    assert max(len(encode(message)) for message in messages) <= KV.max_bytes
    assert [message.sequence for message in messages] == list(range(1, len(messages) + 1))
    assert [message.cleared for message in messages] == [True] + [False] * (len(messages) - 1)


def test_all_that_is_held_is_announced_again() -> None:
    one, late = feed(blocks()), Scheduler()
    hear(one, Scheduler(), 0, batch(stored([1, 2], None, [1, 2, 3, 4])), {})
    late.take(one.announce())
    assert late.holds(gateway([1, 2, 3, 4])) == 2


class Engine:
    """A KV cache of prompts over two tokens, with the messages that it published and those it still has."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, ...], None] = {}
        self.sequence = 0
        self.published: list[bytes] = []

    def key(self, path: tuple[int, ...]) -> int:
        return hash(path) % 2**63

    def store(self, path: tuple[int, ...]) -> bytes:
        events: list[object] = []
        for end in range(1, len(path) + 1):
            if path[:end] in self.held:
                continue
            self.held[path[:end]] = None
            parent = self.key(path[: end - 1]) if end > 1 else None
            events.append(stored([self.key(path[:end])], parent, [path[end - 1]] * SIZE))
        return batch(*events)

    def evict(self, path: tuple[int, ...]) -> bytes:
        """A block with all that follows it, the last first, as engines do."""
        gone = sorted((p for p in self.held if p[: len(path)] == path), key=len, reverse=True)
        for one in gone:
            del self.held[one]
        return batch(*(["BlockRemoved", [self.key(one)]] for one in gone))


paths = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "evict", "clear", "restart"]),
        paths,
        # Whether the message is heard, and whether the engine keeps it for a replay.
        st.sampled_from(["heard", "heard", "missed", "lost"]),
    ),
    max_size=25,
)


@given(steps)
def test_whatever_is_lost_schedulers_expect_nothing_that_the_engine_does_not_hold(
    done: list[tuple[str, tuple[int, ...], str]],
) -> None:
    engine, one, scheduler = Engine(), feed(blocks()), Scheduler()
    kept: dict[int, bytes] = {}
    missed = lost = False
    for kind, path, fate in done:
        if kind == "restart":
            # Whatever was not heard of the life before ends with it.
            engine, kept, missed, lost = Engine(), {}, False, False
            hear(one, scheduler, 0, batch(), kept)
            kept[0] = batch()
            engine.sequence = 1
            continue
        if kind == "clear":
            engine.held.clear()
            payload = batch(["AllBlocksCleared"])
        else:
            payload = engine.store(path) if kind == "store" else engine.evict(path)
        sequence, engine.sequence = engine.sequence, engine.sequence + 1
        if fate != "lost":
            kept[sequence] = payload
        if fate == "heard":
            hear(one, scheduler, sequence, payload, kept)
            missed = False
            lost = lost and kind != "clear"
        else:
            missed, lost = True, lost or fate == "lost"
        if missed:
            continue
        for prompt in itertools.product((0, 1), repeat=4):
            hashes = gateway([token for token in prompt for _ in range(SIZE)])
            truth = next((n for n in range(4) if prompt[: n + 1] not in engine.held), 4)
            found = scheduler.holds(hashes)
            assert found <= truth
            if not lost:
                assert found == truth


@pytest.mark.parametrize(
    ("labels", "ports", "target"),
    [
        ({}, (0, 0), None),
        ({}, (5557, 0), KvTarget(("h", 5557), None, ("m",))),
        ({}, (5557, 5558), KvTarget(("h", 5557), ("h", 5558), ("m",))),
        ({"penstock/kv-events": "7000"}, (5557, 5558), KvTarget(("h", 7000), None, ("m",))),
        (
            {"penstock/kv-events": "tcp://k:1", "penstock/kv-events-replay": "[::1]:2"},
            (0, 0),
            KvTarget(("k", 1), ("::1", 2), ("m",)),
        ),
        (
            {"model.aibrix.ai/kv-events-enabled": "true"},
            (0, 0),
            KvTarget(("h", 5557), ("h", 5558), ("m",)),
        ),
    ],
)
def test_where_events_are_published(
    labels: dict[str, str], ports: tuple[int, int], target: KvTarget | None
) -> None:
    instance = Instance(id="e", endpoint=Endpoint("h", 8000), models=("m",), labels=labels)
    assert target_of(instance, ports) == target


def test_each_dp_rank_has_the_next_port_and_takes_its_own_batches() -> None:
    instance = Instance(id="e", endpoint=Endpoint("h", 8000), models=("m",), dp_rank=2, dp_size=4)
    assert target_of(instance, (5557, 0)) == KvTarget(("h", 5559), None, ("m",), 2)
    one = KvFeed("e", blocks(), lambda: "f", dp_rank=2)
    one.see(0)
    other = msgspec.msgpack.encode([0.0, [stored([1], None, [1, 2])], 1])
    assert [message.changes for message in one.recovered([], 0, other)] == [()]


@pytest.mark.parametrize("label", ["ipc:///tmp/x", "tcp://*:5557", "h:0", "h:99999", "x", "tcp://:5557"])
def test_labels_that_are_no_address_are_refused(label: str) -> None:
    instance = Instance(id="e", endpoint=Endpoint("h", 1), labels={"penstock/kv-events": label})
    with pytest.raises(ValueError, match="label penstock/kv-events"):
        target_of(instance)
