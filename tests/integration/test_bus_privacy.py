"""What clients say stays between them and the engines: not on the bus, in the log, or in anybody's lines."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import xxhash
from nats.aio.msg import Msg

from integration.bus_users import ALL, StackOfUsers, stack_of_users
from integration.servers import eventually
from integration.stack import MODEL
from penstock.common.block_hash import root_seed
from penstock.common.codec import decode
from penstock.common.messages import PlacedFeed, ScheduleBatch
from penstock.common.subjects import EVENTS, PLACED, SCHEDULE
from penstock.ingress.block_hash import chain, condense

pytestmark = pytest.mark.integration

MARK = "the-secret-of-the-client-4f1c"
SALT = "salt-of-the-client-77aa"
KEY = "sk-key-of-the-client-d00d"
SECRET = "secret-of-the-deployment-3b9e"
PROMPT = f"{MARK} " * 60
FAULTS = (
    "429",
    "500",
    "drop-before-headers",
    "garbage",
    "hang-before-headers",
    "drop-mid-stream",
    "garbage-mid-stream",
    "hang-mid-stream",
)


@pytest.fixture
async def stack() -> AsyncIterator[StackOfUsers]:
    with stack_of_users() as stack:
        stack.start_sims(2)
        stack.start_discovery("--log-level", "debug")
        stack.start_scheduler("--default-routing-strategy", "prefix-cache", "--log-level", "debug")
        flags = ("--request-timeout", "1", "--stream-idle-timeout", "1", "--block-hash-secret", SECRET)
        stack.start_ingress(*flags, "--log-level", "debug")
        await stack.ready()
        yield stack


def chat_body(**fields: Any) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "cache_salt": SALT,
    }
    return body | fields


def hostile_bodies() -> list[bytes]:
    """Bodies that are refused, each with the mark where a message about it might quote it."""
    whole = json.dumps(chat_body()).encode()
    return [
        whole[:-5],
        whole.replace(b'"messages"', b'"nonsense"'),
        json.dumps(chat_body(max_tokens=MARK)).encode(),
        json.dumps(chat_body(stream=MARK)).encode(),
        json.dumps(chat_body(messages=MARK)).encode(),
        json.dumps([MARK]).encode(),
        json.dumps(MARK).encode(),
        MARK.encode(),
        whole.replace(MARK.encode(), MARK.encode() + b"\xff", 1),
        b'{"model": "' + MODEL.encode() + b'", "prompt": ' + b"[" * 5000 + MARK.encode(),
    ]


async def test_no_prompt_answer_key_or_salt_is_on_the_bus_or_in_a_log(stack: StackOfUsers) -> None:
    heard: list[Msg] = []

    async def note(message: Msg) -> None:
        heard.append(message)

    async with stack.users.client(ALL) as spy:
        await spy.client.subscribe(">", cb=note)
        await spy.client.flush()
        answers = await traffic(stack)
        # Everything is said: the last outcome is in the log.
        await eventually(
            lambda: any(
                b"last-of-all" in m.data and m.subject.startswith(EVENTS.subjects[0][:-1]) for m in heard
            )
        )
        # Its line comes apart from it: the ingress writes lines together, and a thread reads them.
        await eventually(lambda: b"last-of-all" in b"\n".join(lines_of(stack)))
        stored = [message.data for message in await everything_stored(spy.client)]
    said = [m.subject.encode() + m.data + repr(m.headers).encode() for m in heard] + stored
    lines = lines_of(stack)
    assert len(said) > 50
    assert len(lines) > 20
    for known in (MODEL.encode(), b"last-of-all"):
        assert [text for text in said if known in text]
        assert [line for line in lines if known in line]
    for secret in (MARK, SALT, KEY, SECRET, *answers):
        for form in (secret.encode(), base64.b64encode(secret.encode())[:-4]):
            assert not [text for text in said + lines if form in text], secret


async def traffic(stack: StackOfUsers) -> set[str]:
    """Requests that succeed, fail and are broken off, streamed and not; a part of each answer."""
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    url, answers = f"{stack.url}/v1/chat/completions", set[str]()
    async with aiohttp.ClientSession(headers=headers) as session:
        for stream in (False, True):
            async with session.post(url, json=chat_body()) as response:
                answers.add((await response.json())["choices"][0]["message"]["content"][:40])
            async with session.post(
                f"{stack.url}/v1/completions", json={"model": MODEL, "prompt": PROMPT}
            ) as response:
                assert response.status == 200
            for fault in FAULTS:
                await sent(
                    session, url, json.dumps(chat_body(stream=stream)).encode(), {"x-sim-fault": fault}
                )
            await sent(
                session,
                url,
                json.dumps(chat_body(stream=stream, max_tokens=5000)).encode(),
                {},
                patience_s=0.1,
            )
        for body in hostile_bodies():
            await sent(session, url, body, {})
        for place in (f"{url}?about={MARK}", f"{stack.url}/v1/{MARK}"):
            await sent(session, place, json.dumps(chat_body()).encode(), {"x-request-id": f"{MARK} {MARK}"})
        await sent(session, url, json.dumps(chat_body(model="nobody-serves-this")).encode(), {})
        await asyncio.to_thread(stack.schedulers[0].kill)
        await sent(session, url, json.dumps(chat_body()).encode(), {})
        for sim in stack.sims:
            await asyncio.to_thread(sim.kill)
        await sent(session, url, json.dumps(chat_body()).encode(), {"x-request-id": "last-of-all"})
    return answers


async def sent(
    session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str], patience_s: float = 30.0
) -> None:
    """Whatever comes of it; a client without patience leaves."""
    timeout = aiohttp.ClientTimeout(patience_s)
    try:
        async with session.post(url, data=body, headers=headers, timeout=timeout) as response:
            await response.read()
    except (aiohttp.ClientError, TimeoutError):
        return


async def everything_stored(client: Any) -> list[Any]:
    """Every message of every stream."""
    streams = client.jetstream()
    stored = []
    for info in await streams.streams_info():
        for sequence in range(info.state.first_seq, info.state.last_seq + 1):
            try:
                stored.append(await streams.get_msg(info.config.name, sequence, direct=True))
            except Exception:  # noqa: BLE001, S112  # of a key that was written again only the last is kept
                continue
    return stored


def lines_of(stack: StackOfUsers) -> list[bytes]:
    """Everything that a process of the stack has printed so far."""
    assert stack.discovery is not None
    ingresses = [ingress.process for ingress in stack.ingresses]
    processes = [*stack.schedulers, stack.discovery, *ingresses, stack.nats.process]
    return [line.encode() for process in processes for line in [*process.lines, *process.out]]


async def test_block_hashes_on_the_bus_say_nothing_to_who_knows_the_prompt(stack: StackOfUsers) -> None:
    """Without the deployment's secret a guess of the prompt cannot be tested against them."""
    heard: list[Msg] = []

    async def note(message: Msg) -> None:
        heard.append(message)

    async with stack.users.client(ALL) as spy, aiohttp.ClientSession() as session:
        await spy.client.subscribe(">", cb=note)
        await spy.client.flush()
        body = json.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
        )
        async with session.post(f"{stack.url}/v1/chat/completions", data=body) as response:
            assert response.status == 200
        await eventually(lambda: hashes_in(heard))
    prompt = json.dumps([{"role": "user", "content": PROMPT}]).encode()
    guesses = [root_seed("", MODEL), root_seed(MODEL, MODEL), 0, xxhash.xxh3_64_intdigest(MODEL.encode())]
    guessed = {block for seed in guesses for block in blocks(chain(condense(prompt), seed, 256))}
    right = blocks(chain(condense(prompt), root_seed(SECRET, MODEL), 256))
    said = hashes_in(heard)
    assert right <= said
    assert not guessed & said


def blocks(packed: bytes) -> set[bytes]:
    return {packed[at : at + 8] for at in range(0, len(packed), 8)}


def hashes_in(heard: list[Msg]) -> set[bytes]:
    """Block hashes of schedule messages and placements."""
    found: set[bytes] = set()
    for message in heard:
        if message.subject.startswith(SCHEDULE.request.name("")[:-1]):
            for request in decode(ScheduleBatch, message.data).requests:
                found |= blocks(request.block_hashes)
        elif message.subject == PLACED.name("0"):
            for placed in decode(PlacedFeed, message.data).placed:
                found |= blocks(placed.tail)
    return found
