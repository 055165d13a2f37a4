"""What the engine model says of its prefix cache: true, in order, and in the engines' own words."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from penstock.sim import text
from penstock.sim.blocks import chain_hashes
from penstock.sim.engine import Engine
from penstock.sim.kv_log import Cleared, KvLog, Removed, Stored, encode
from penstock.sim.spec import EngineRequest, EngineSpec

SIZE = 2


class Told:
    """An engine, and who believes its log."""

    def __init__(self, blocks: int) -> None:
        self.log = KvLog(SIZE)
        self.engine = Engine(EngineSpec(kv_blocks=blocks, block_size=SIZE), self.log)
        self.events: list[Stored | Removed | Cleared] = []
        self.held: set[int] = set()
        self._now = 0.0

    def run(self, prompt: str, output: int = 1, root: str = "") -> tuple[int, ...]:
        """A request from beginning to end; its block hashes."""
        tokens = text.tokenize(prompt)
        hashes = chain_hashes(tokens, text.TOKEN_BYTES, SIZE, root)
        self._now += 1
        request = EngineRequest(
            str(self._now), text.count(tokens), output, hashes, tokens=tokens, cache_root=root
        )
        self.engine.submit(request, self._now)
        while (duration := self.engine.start_step(self._now)) is not None:
            self.believe(self.log.take())
            self._now += duration
            self.engine.end_step(self._now)
        return hashes

    def believe(self, events: Iterable[Stored | Removed | Cleared]) -> None:
        for event in events:
            self.events.append(event)
            if isinstance(event, Stored):
                assert event.parent is None or event.parent in self.held
                assert not self.held & {*event.hashes}
                self.held |= {*event.hashes}
            elif isinstance(event, Removed):
                self.held.remove(event.block_hash)
            else:
                self.held.clear()


def test_whoever_believes_the_log_knows_the_cache() -> None:
    told = Told(blocks=8)
    prompts = ["aaaabbbbccccdddd" * n + f"{m:04}" * 4 for n in range(1, 3) for m in range(6)]
    asked = [told.run(prompt) for prompt in prompts]
    assert any(isinstance(event, Removed) for event in told.events)
    for hashes in asked:
        held = next((n for n, one in enumerate(hashes) if one not in told.held), len(hashes))
        assert told.engine.prefix_match(hashes) == held


def test_a_run_of_blocks_is_one_event_and_evictions_come_before_it() -> None:
    told = Told(blocks=4)
    first = told.run("aaaabbbbccccdddd")
    told.run("eeeeffffgggghhhhiiiijjjj")
    assert told.events[0] == Stored(first, None, text.tokenize("aaaabbbbccccdddd"), "")
    kinds = [type(event) for event in told.events[1:]]
    assert kinds[0] is Removed
    assert kinds[-1] is Stored


def test_an_emptied_cache_is_told_with_the_next_step() -> None:
    told = Told(blocks=8)
    told.run("aaaabbbb")
    assert told.engine.reset_prefix_cache()
    told.run("ccccdddd")
    assert [type(event) for event in told.events] == [Stored, Cleared, Stored]


def test_a_cache_in_use_is_not_emptied() -> None:
    told = Told(blocks=8)
    told.engine.submit(EngineRequest("r", 2, 1, (5,)), 0.0)
    told.engine.start_step(0.0)
    assert not told.engine.reset_prefix_cache()


STORED = Stored((2**63 + 1, 7), None, text.from_ids([1, 2, 3, 4]), "lora\nsalt")
CHILD = Stored((9,), 7, text.from_ids([5, 6]), "")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        (
            "vllm",
            [
                1.5,
                [
                    {
                        "type": "BlockStored",
                        "block_hashes": [2**63 + 1, 7],
                        "parent_block_hash": None,
                        "token_ids": [1, 2, 3, 4],
                        "block_size": 2,
                        "lora_id": 1,
                        "medium": "GPU",
                        "lora_name": "lora",
                        "extra_keys": [["lora", "salt"], ["lora"]],
                        "group_idx": 0,
                        "kv_cache_spec_kind": "full_attention",
                    },
                    {"type": "BlockRemoved", "block_hashes": [9], "medium": "GPU", "group_idx": 0},
                    {"type": "AllBlocksCleared"},
                ],
                None,
            ],
        ),
        (
            "sglang",
            [
                1.5,
                [
                    ["BlockStored", [2**63 + 1 - 2**64, 7], None, [1, 2, 3, 4], 2, 1],
                    ["BlockRemoved", [9]],
                    ["AllBlocksCleared"],
                ],
            ],
        ),
        (
            "vllm-bytes",
            [
                1.5,
                [
                    [
                        "BlockStored",
                        [b"\x80" + bytes(6) + b"\x01", bytes(7) + b"\x07"],
                        None,
                        [1, 2, 3, 4],
                        2,
                        1,
                        "GPU",
                        "lora",
                        [["lora", "salt"], ["lora"]],
                    ],
                    ["BlockRemoved", [bytes(7) + b"\x09"], "GPU"],
                    ["AllBlocksCleared"],
                ],
                None,
            ],
        ),
    ],
)
def test_each_encoding_says_it_as_its_engine_does(encoding: str, expected: list[object]) -> None:
    payload = encode([STORED, Removed(9), Cleared()], encoding, SIZE, 1.5)  # type: ignore[arg-type]  # a literal
    assert msgspec.msgpack.decode(payload) == expected
    child = msgspec.msgpack.decode(encode([CHILD], encoding, SIZE, 1.5))[1][0]  # type: ignore[arg-type]  # as above
    parent = child["parent_block_hash"] if isinstance(child, dict) else child[2]
    assert parent in (7, bytes(7) + b"\x07")
