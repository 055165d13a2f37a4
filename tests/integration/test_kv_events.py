"""A follow-up lands where its prefix really is: engines announce their KV caches, gateway and engines count
in the same tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from integration.servers import eventually, free_port
from integration.stack import MODEL, Stack, metric, running_stack
from penstock.sim import text

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

BLOCK_TOKENS, KV_BLOCKS = 16, 200
SECRET = "one secret"
WORDS = text.answer(b"", 61, model="").text[16:]
_numbers = itertools.count()


def write_tokenizer(folder: Path) -> None:
    """The simulated engines' tokens as a tokenizer file: four characters each, the id their bytes. It knows
    the answers' words and four digits."""
    digits = ("".join(four) for four in itertools.product("0123456789abcdef", repeat=4))
    pieces = {WORDS[at : at + 4] for at in range(0, len(WORDS) - 3, 4)}
    vocabulary = {piece: text.token_ids(piece.encode())[0] for piece in (*digits, *pieces)}
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]{4}"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocabulary | {"?": 1}, "unk_token": "?"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def prompt(blocks: int) -> str:
    """A prompt of its own, of so many blocks and one token."""
    words = WORDS[: len(WORDS) // 4 * 4]
    tokens = blocks * BLOCK_TOKENS + 1
    return (f"{next(_numbers):04}" + words * (tokens * 4 // len(words) + 1))[: tokens * 4]


class Lab:
    """Two engines, whose requests may also go around the gateway."""

    def __init__(self, stack: Stack, session: aiohttp.ClientSession, flags: list[list[str]]) -> None:
        self.stack, self.session, self.flags = stack, session, flags
        self.names = ["a", "b"]

    async def store(self, engine: int, content: str) -> None:
        """Have an engine compute a prompt, unseen by the gateway, until the scheduler has heard of it."""
        before = await self.results("applied")
        await self.compute(engine, content)

        async def heard() -> bool:
            return await self.results("applied") > before

        await eventually(heard)

    async def compute(self, engine: int, content: str) -> None:
        """Have an engine compute a prompt."""
        url = f"http://{self.stack.engines[engine]}/v1/completions"
        body = {"model": MODEL, "prompt": content, "max_tokens": 1}
        async with self.session.post(url, json=body) as response:
            assert response.status == 200

    async def results(self, result: str) -> float:
        """Messages on KV caches that the scheduler met in this way."""
        url = f"http://127.0.0.1:{self.stack.scheduler_ports[0]}/metrics"
        async with self.session.get(url) as response:
            page = await response.text()
        line = f'penstock_scheduler_kv_events_total{{result="{result}"}} '
        return next((float(one.removeprefix(line)) for one in page.splitlines() if one.startswith(line)), 0.0)

    async def ask(self, content: str) -> tuple[str, int]:
        """(instance that served it, tokens it had cached)."""
        body = {"model": MODEL, "prompt": content, "max_tokens": 1}
        async with self.session.post(f"{self.stack.url}/v1/completions", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return response.headers["target-pod"], cached


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    with running_stack() as stack:
        lines, flags = [], []
        for name, encoding in (("a", "vllm"), ("b", "sglang")):
            events, replay = free_port(), free_port()
            flags.append(
                [
                    *("--kv-blocks", str(KV_BLOCKS), "--block-size", str(BLOCK_TOKENS)),
                    *("--kv-events-port", str(events), "--kv-events-replay-port", str(replay)),
                    *("--kv-events-encoding", encoding),
                ]
            )
            stack.start_sims(1, *flags[-1])
            host, port = stack.engines[-1].split(":")
            labels = {"penstock/kv-events": str(events), "penstock/kv-events-replay": str(replay)}
            record = {"id": name, "endpoint": {"host": host, "port": int(port)}, "labels": labels}
            lines.append(json.dumps({"instances": [record]}))
        listed = folder / "engines.txt"
        listed.write_text("\n".join(lines))
        stack.start_discovery_of(
            "endpoints",
            *("--llm-backend-endpoints", f"@{listed}", "--kv-events", "blocks"),
            *("--block-hash-secret", SECRET),
        )
        stack.start_scheduler("--default-routing-strategy", "prefix-cache")
        stack.start_ingress("--tokenizer-path", str(folder), "--block-hash-secret", SECRET)
        await stack.ready()
        async with aiohttp.ClientSession() as session:
            lab = Lab(stack, session, flags)

            async def heard() -> bool:
                # A subscription takes a moment to arrive at its publisher.
                for engine in (0, 1):
                    await lab.compute(engine, prompt(1))
                return await lab.results("applied") >= 4

            await eventually(heard)
            yield lab
        for process in (*stack.sims, *stack.schedulers, stack.ingresses[0].process, stack.discovery):
            assert process is None or "Traceback" not in process.stderr


# 1.3 KB are read on the event loop, 5 KB in the helper.
@pytest.mark.parametrize("blocks", [20, 80])
@pytest.mark.parametrize("engine", [0, 1])
async def test_a_request_goes_where_its_prefix_is_though_no_placement_brought_it(
    lab: Lab, engine: int, blocks: int
) -> None:
    content = prompt(blocks)
    await lab.store(engine, content)
    assert await lab.ask(content) == (lab.names[engine], blocks * BLOCK_TOKENS)


async def test_after_eviction_it_goes_to_the_other_engine_that_still_has_it(lab: Lab) -> None:
    content = prompt(20)
    for engine in (0, 1):
        await lab.store(engine, content)
    gone = (await lab.ask(content))[0]
    other = "b" if gone == "a" else "a"
    filled = 0
    while filled <= KV_BLOCKS:
        await lab.store(lab.names.index(gone), prompt(90))
        filled += 90

    async def moved() -> bool:
        return (await lab.ask(content)) == (other, 20 * BLOCK_TOKENS)

    await eventually(moved)


async def test_an_emptied_cache_attracts_nobody(lab: Lab) -> None:
    content = prompt(20)
    await lab.store(1, content)
    cleared = await lab.results("cleared")
    async with lab.session.post(f"http://{lab.stack.engines[1]}/reset_prefix_cache") as response:
        assert response.status == 200
    await lab.store(1, prompt(1))
    assert await lab.results("cleared") > cleared
    await lab.store(0, content)
    assert (await lab.ask(content))[0] == "a"


async def test_an_engine_killed_and_started_again_attracts_nobody(lab: Lab) -> None:
    content = prompt(20)
    await lab.store(0, content)
    lab.stack.sims[0].kill()
    lab.stack.restart_sim(0, *lab.flags[0])
    forgotten = await lab.results("gap")

    async def heard() -> bool:
        await lab.compute(0, prompt(1))
        return await lab.results("gap") > forgotten

    await eventually(heard)
    await lab.store(1, content)

    async def other() -> bool:
        return (await lab.ask(content)) == ("b", 20 * BLOCK_TOKENS)

    await eventually(other)


async def test_precision_is_measured_against_what_engines_report(lab: Lab) -> None:
    content = prompt(20)
    name = "penstock_scheduler_prefix_precision_ratio"
    port = lab.stack.scheduler_ports[0]

    async def measured() -> bool:
        await lab.ask(content)
        return 0.8 <= await metric(lab.session, port, name) <= 2.0

    await eventually(measured)
