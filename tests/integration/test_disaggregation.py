"""Requests divided between prefill and decode instances: one answer, whatever goes wrong. About 50 s."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from integration.pd_stack import CONNECTORS, PdStack, pd_stack, sim_state
from integration.servers import NatsServer, Process, eventually
from integration.stack import metric
from penstock.common.model import Role
from penstock.sim.text import expected_text

Json = dict[str, Any]
FLAGS = (
    *("--retry-max-count", "2", "--retry-budget-percent", "100", "--prefill-timeout", "2"),
    *("--breaker-failures", "0", "--breaker-error-percent", "0"),
)
SOAK = "PENSTOCK_SOAK_SECONDS" in os.environ
# Questions after which one has surely met one of two instances.
TURNS = 40
# Clients that leave before they are answered, over all connectors.
CANCELLED, CLIENTS = int(os.environ.get("PENSTOCK_CANCELS", "10000" if SOAK else "200")), 20
PROMPT = "What is the answer to everything? " * 20
# A conversation in which a tool was called before.
CALL = {"id": "call_1", "type": "function", "function": {"name": "note", "arguments": '{"text":"é"}'}}
CALLED = [
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "noted"},
]
# Words of the simulated engines' answers.
STOP = [" elk", " oak"]
MODES = [
    (model, mode)
    for model in CONNECTORS
    for mode in ("batched", "staged")
    if (model, mode) != ("sglang", "staged")
]


@pytest.fixture(scope="module")
def pd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PdStack]:
    with pd_stack(tmp_path_factory.mktemp("pd"), *FLAGS, schedulers=1) as made:
        yield made


@pytest.fixture
async def session(pd: PdStack) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        await pd.ready(made)
        yield made


def body_of(model: str, *, stream: bool, chat: bool = True, **more: Any) -> Json:
    prompt: Json = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return {"model": model, **prompt, "max_tokens": 12, "stream": stream, **usage, "temperature": 0.5, **more}


async def ask(
    session: aiohttp.ClientSession, url: str, body: Json, **headers: str
) -> tuple[int, dict[str, str], list[Json]]:
    """(status, headers in lower case, the one answer or the events of the stream)."""
    path = "chat/completions" if "messages" in body else "completions"
    async with session.post(f"{url}/v1/{path}", json=body, headers=headers) as response:
        text = await response.text()
        said = {name.lower(): value for name, value in response.headers.items()}
        if not said["content-type"].startswith("text/event-stream"):
            return response.status, said, [json.loads(text)]
        payloads = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert payloads.pop() == "[DONE]"
        return response.status, said, [json.loads(payload) for payload in payloads]


def comparable(answer: list[Json]) -> list[Json]:
    """Without what differs between two answers to the same request, and between engines."""
    found = []
    for one in answer:
        ids = {"id", "created", "kv_transfer_params"}
        one = {name: value for name, value in one.items() if name not in ids}
        if one.get("usage"):
            one["usage"] = {k: v for k, v in one["usage"].items() if k != "prompt_tokens_details"}
        found.append(one)
    return found


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("look_up", "note")
]
PARTS = [
    {"type": "text", "text": PROMPT},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
]
# What a client may wish for beside plain text, and how the answer to it ends.
WISHES: list[tuple[Json, str]] = [
    ({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}, "tool_calls"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "note"}}}, "tool_calls"),
    ({"tools": TOOLS, "tool_choice": "required", "max_completion_tokens": 6}, "length"),
    ({"tools": TOOLS, "messages": CALLED}, "stop"),
    ({"response_format": {"type": "json_object"}, "logprobs": True, "top_logprobs": 2}, "stop"),
    ({"messages": [{"role": "user", "content": PARTS}], "stop": STOP, "seed": 7}, "stop"),
]


@pytest.mark.parametrize(("model", "mode"), MODES)
async def test_whatever_a_client_wishes_for_its_answer_is_that_of_an_engine_alone(
    pd: PdStack, session: aiohttp.ClientSession, model: str, mode: str
) -> None:
    whole = f"http://{pd.engines[model, Role.DECODE][0]}"
    for wish, end in WISHES:
        for stream in (False, True):
            body = {**body_of(model, stream=stream), **wish}
            if "max_completion_tokens" not in wish:
                del body["max_tokens"]
            status, headers, answer = await ask(session, pd.urls[mode], body, **{"routing-strategy": "pd"})
            assert status == 200, (wish, answer)
            assert "prefill-target-pod" in headers, wish
            assert comparable(answer) == comparable((await ask(session, whole, body))[2]), wish
            assert len({one["id"] for one in answer}) == 1
            ends = [choice["finish_reason"] for one in answer for choice in one["choices"]]
            assert (ends[-1], set(ends[:-1]) - {None}) == (end, set()), wish
            assert answer[-1]["usage"]["completion_tokens"] > 1
            calls = [call for one in answer for call in called_in(one)]
            assert len({call["id"] for call in calls if "id" in call}) == ("tool_choice" in wish)
            if end == "tool_calls":
                assert json.loads("".join(call["function"]["arguments"] for call in calls))["text"]
    # Two answers to one prompt need its KV twice.
    status, headers, answer = await ask(
        session, pd.urls[mode], body_of(model, stream=False, n=2), **{"routing-strategy": "pd"}
    )
    assert (status, len(answer[0]["choices"])) == (200, 2)
    assert "prefill-target-pod" not in headers
    await pd.settled(session)


def called_in(one: Json) -> list[Json]:
    """Calls of tools, or their pieces."""
    choice = one["choices"][0] if one["choices"] else {}
    return list((choice.get("message") or choice.get("delta") or {}).get("tool_calls") or [])


@pytest.mark.parametrize(("model", "mode"), MODES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_divided_answer_is_the_one_that_an_engine_alone_gives(
    pd: PdStack, session: aiohttp.ClientSession, model: str, mode: str, stream: bool
) -> None:
    for chat in (True, False):
        body = body_of(model, stream=stream, chat=chat, max_completion_tokens=12, user="somebody")
        status, headers, answer = await ask(session, pd.urls[mode], body, **{"routing-strategy": "pd"})
        assert status == 200, answer
        whole = f"http://{pd.engines[model, Role.DECODE][0]}"
        assert comparable(answer) == comparable((await ask(session, whole, body))[2])
        assert len({one["id"] for one in answer}) == 1
        assert headers["target-pod"].startswith(f"{model}-decode-")
        assert headers["prefill-target-pod"].startswith(f"{model}-prefill-")
        assert headers["prefill-target-pod-ip"] in pd.engines[model, Role.PREFILL]
    await pd.settled(session)


async def test_a_profile_says_how_a_model_is_divided(pd: PdStack, session: aiohttp.ClientSession) -> None:
    url, admin = pd.urls["batched"], f"http://127.0.0.1:{pd.admin_ports['batched']}/admin/api/profiles/nixl"

    async def pairs(mode: str) -> bool:
        """Whether a request that asks for nothing is divided in this mode."""
        before = await staged()
        _, headers, _ = await ask(session, url, body_of("nixl", stream=False))
        if not mode:
            return "prefill-target-pod" not in headers
        return "prefill-target-pod" in headers and (await staged() > before) is (mode == "staged")

    async def staged() -> float:
        page = await (await session.get(f"http://127.0.0.1:{pd.admin_ports['batched']}/metrics")).text()
        name = 'penstock_ingress_pairs_total{mode="staged",protocol="vllm-nixl",result="answered"}'
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))

    assert await pairs("")
    for said, mode in (
        ({"disaggregation": {"protocol": "vllm-nixl"}}, "batched"),
        ({"disaggregation": {"mode": "staged"}}, "staged"),
        ({"routing_strategy": "pd"}, "batched"),
        ({}, ""),
    ):
        async with session.put(admin, json={"profiles": {"default": said}}) as response:
            assert response.status in (200, 201), await response.text()
        await eventually(partial(pairs, mode))
    impossible = {"profiles": {"x": {"disaggregation": {"protocol": "sglang-mooncake", "mode": "staged"}}}}
    async with session.put(admin, json=impossible) as response:
        assert response.status == 400
        assert "staged is done by vllm-kvt" in await response.text()
    async with session.delete(admin) as response:
        assert response.status == 200


async def strike(session: aiohttp.ClientSession, engines: list[str], kind: str) -> None:
    """One fault at each of the engines."""
    for engine in engines:
        fault = {"kind": kind, "count": 1} if kind != "refuse" else {"kind": kind, "ms": 60_000}
        async with session.post(f"http://{engine}/sim/fault", json=fault) as response:
            assert response.status == 200, await response.text()


async def heal(session: aiohttp.ClientSession, engines: list[str]) -> None:
    async def reachable() -> bool:
        try:
            for engine in engines:
                async with session.delete(f"http://{engine}/sim/fault"):
                    pass
        except aiohttp.ClientConnectionError:
            return False
        return True

    await eventually(reachable)


P, D = Role.PREFILL, Role.DECODE
# (who is struck, by what, whether both instances of that role are, what the client gets). With two retries
# the first fault costs one; where both are struck the second pair fails too.
POINTS: list[tuple[Role, str, bool, str | int]] = [
    (P, "refuse", False, "answer"),
    (P, "drop-before-headers", False, "answer"),
    (P, "500", False, "answer"),
    (P, "garbage", False, "answer"),
    (P, "drop-mid-stream", False, "answer"),
    (P, "429", True, 429),
    # The third attempt is all of it on an instance that decodes.
    (P, "500", True, "answer"),
    (P, "drop-before-headers", True, "answer"),
    (D, "refuse", False, "answer"),
    (D, "drop-before-headers", False, "answer"),
    (D, "500", False, "answer"),
    (D, "429", True, 429),
    (D, "500", True, 500),
    (D, "drop-mid-stream", True, "broken off"),
]


@pytest.mark.parametrize(("model", "mode"), MODES)
async def test_whatever_fails_is_tried_again_or_told_and_nothing_is_kept(
    pd: PdStack, session: aiohttp.ClientSession, model: str, mode: str
) -> None:
    url = pd.urls[mode]
    for number, (role, kind, both, outcome) in enumerate(POINTS):
        if role is P and (model, mode) == ("kvt", "batched"):
            # Prefill gets no request there.
            continue
        for stream in (False, True) if SOAK else (bool(number % 2),):
            case = f"{role} {kind} {both} stream={stream}"
            struck = pd.engines[model, role]
            body = body_of(model, stream=stream, user=case)
            before = await moves(pd, session, mode)
            await strike(session, struck if both else struck[:1], kind)
            try:
                await outcome_is(session, url, body, outcome, case)
                for turn in range(0 if both else TURNS):
                    if await moves(pd, session, mode) > before:
                        break
                    # It met the other one, which the prompt or chance decides.
                    body["messages"][0]["content"] = f"{turn} {PROMPT}"
                    await outcome_is(session, url, body, outcome, case)
                # A 4xx, and what broke off after its first token, are nobody else's to answer. SGLang's
                # prefill is not listened to once it has agreed.
                heard = (model, role, kind) != ("sglang", P, "drop-mid-stream")
                tried_again = outcome not in (429, "broken off") and heard
                assert (await moves(pd, session, mode) > before) is tried_again, case
            finally:
                for sim in pd.stack.sims if kind == "refuse" else ():
                    sim.heal()
                await heal(session, struck)
    await pd.settled(session)


async def moves(pd: PdStack, session: aiohttp.ClientSession, mode: str) -> float:
    """Requests that went on to other instances so far."""
    return await metric(session, pd.admin_ports[mode], "penstock_ingress_moves_total")


async def outcome_is(
    session: aiohttp.ClientSession, url: str, body: Json, outcome: str | int, case: str
) -> None:
    if outcome == "broken off":
        path = f"{url}/v1/chat/completions"
        async with session.post(path, json=body, headers={"routing-strategy": "pd"}) as response:
            assert response.status == 200, case
            if body["stream"]:
                assert "upstream_unreachable" in await response.text(), case
            else:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
        return
    status, _, answer = await ask(session, url, body, **{"routing-strategy": "pd"})
    if outcome == "answer":
        assert status == 200, (case, answer)
        text = "".join(said_in(one) for one in answer)
        assert text == expected_text(body["messages"], 12, model=body["model"]), case
    else:
        assert status == outcome, (case, answer)


def said_in(one: Json) -> str:
    choice = one["choices"][0] if one["choices"] else {}
    return str((choice.get("message") or choice.get("delta") or {}).get("content") or "")


@pytest.mark.parametrize("model", CONNECTORS)
async def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    pd: PdStack, session: aiohttp.ClientSession, model: str
) -> None:
    chance = random.Random(model)
    modes = [mode for mode in pd.urls if (model, mode) in MODES]

    async def leave(number: int, within_s: float) -> bool:
        """Whether the client left before the answer was complete."""
        body = body_of(model, stream=bool(number % 2), user=str(number))
        body["messages"][0]["content"] = f"{number} {PROMPT}"
        body["max_tokens"] = 40
        url = pd.urls[modes[number // 2 % len(modes)]]
        try:
            async with asyncio.timeout(chance.uniform(0, within_s)):
                await ask(session, url, body, **{"routing-strategy": "pd"})
        except TimeoutError:
            return True
        return False

    left, asked, within_s = 0, 0, 0.3
    while left < CANCELLED // len(CONNECTORS):
        gone = sum(await asyncio.gather(*(leave(asked + n, within_s) for n in range(CLIENTS))))
        left, asked = left + gone, asked + CLIENTS
        # About half of them leave, so that they do it in every phase, however fast the machine is.
        within_s *= 0.8 if gone < CLIENTS // 2 else 1.25
    print(f"{model}: {left} of {asked} clients left")
    await pd.settled(session)


async def test_prompts_that_nobody_fetches_are_counted_of_answers_in_one_piece_too(
    pd: PdStack, session: aiohttp.ClientSession
) -> None:
    decodes, (port,) = pd.engines["nixl", D], pd.stack.scheduler_ports

    async def kept(what: str) -> int:
        states = [await sim_state(session, engine) for engine in pd.engines["nixl", P]]
        return sum(int(state["transfers"][what]) for state in states)

    async def is_kept(already: int) -> bool:
        return await kept("kept") > already

    async def is_told(expired: int) -> bool:
        told = await metric(session, port, "penstock_scheduler_prompts_expired_total")
        return told == await kept("expired") == expired

    before = await kept("expired")
    for left, stream in enumerate((False, True), 1):
        slow = {"kind": "slow-start", "count": 1, "ms": 30_000}
        for engine in decodes:
            async with session.post(f"http://{engine}/sim/fault", json=slow):
                pass
        body, already = body_of("nixl", stream=stream), await kept("kept")
        asking = asyncio.create_task(ask(session, pd.urls["batched"], body, **{"routing-strategy": "pd"}))
        await eventually(partial(is_kept, already), 60.0)
        # NIXL has no order to drop what is kept: it ends by the engine's lease.
        asking.cancel()
        await asyncio.wait([asking])
        await eventually(partial(is_told, before + left), 60.0)
        await heal(session, decodes)
    await pd.settled(session)


async def test_decode_is_placed_by_whoever_is_left_after_prefill(tmp_path: Path) -> None:
    models = [model for model, mode in MODES if mode == "staged"]
    with pd_stack(
        tmp_path, "--schedule-timeout", "5", models=models, modes=["staged"], schedulers=2, sims=1
    ) as pd:
        async with aiohttp.ClientSession() as session:
            await pd.ready(session)
            url = pd.urls["staged"]

            async def placed_by_schedulers() -> bool:
                body = body_of("nixl", stream=False)
                headers = (await ask(session, url, body, **{"routing-strategy": "pd"}))[1]
                return headers.get("routing-strategy") != "local" and "prefill-target-pod" in headers

            async def all_there(engines: list[str], before: list[int]) -> bool:
                """Whether each has got another request."""
                now = [await seen_by(session, engine) for engine in engines]
                return all(one > known for one, known in zip(now, before, strict=True))

            await eventually(placed_by_schedulers, 60.0)
            prefills = [engine for model in models for engine in pd.engines[model, P]]
            losses: list[Process | NatsServer] = [*pd.stack.schedulers, pd.stack.nats]
            for number, lost in enumerate(losses):
                asking, before = [], [await seen_by(session, engine) for engine in prefills]
                for model in models:
                    (prefill,) = pd.engines[model, P]
                    slow = {"kind": "slow-start", "count": 1, "ms": 2500}
                    async with session.post(f"http://{prefill}/sim/fault", json=slow):
                        pass
                    body = body_of(model, stream=True)
                    asking.append(asyncio.create_task(ask(session, url, body, **{"routing-strategy": "pd"})))
                await eventually(partial(all_there, prefills, before))
                lost.kill()
                for model, one in zip(models, asking, strict=True):
                    status, headers, answer = await one
                    assert status == 200, (model, answer)
                    assert headers["prefill-target-pod"].startswith(f"{model}-prefill-")
                    # The scheduler that is left, which never saw the first stage, then the ingress itself.
                    assert (headers["routing-strategy"] == "local") is (number > 0), (model, headers)
                    text = "".join(said_in(piece) for piece in answer)
                    assert text == expected_text(body["messages"], 12, model=model)
            await pd.settled(session)


async def seen_by(session: aiohttp.ClientSession, engine: str) -> int:
    """Requests that it received."""
    return int((await sim_state(session, engine))["requests_total"])
