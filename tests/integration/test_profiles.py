"""Config profiles through a whole stack: by header, from a file, changed live on every replica, from pods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from integration.kubernetes_lab import kubeconfig
from integration.kubernetes_objects_made import pod
from integration.kubernetes_stub import KubernetesStub
from integration.servers import eventually
from integration.stack import MODEL, Stack, chat, running_stack

pytestmark = pytest.mark.integration

FILE = {
    MODEL: {
        "default": "calm",
        "profiles": {
            "calm": {"routing_strategy": "throughput"},
            "fast": {"routing_strategy": "least-latency"},
            "fixed": {"routing_strategy": "round-robin", "locked": True},
            "short": {"prompt_buckets": [{"max_tokens": 5}]},
        },
    }
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    path = tmp_path_factory.mktemp("profiles") / "profiles.yaml"
    path.write_text(json.dumps(FILE), encoding="utf-8")
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler("--profiles-file", str(path))
        stack.start_scheduler("--profiles-file", str(path))
        stack.start_ingress()
        asyncio.run(stack.ready())
        yield stack


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def administer(
    stack: Stack, session: aiohttp.ClientSession, method: str, model: str = MODEL, value: Any = None
) -> tuple[int, Any]:
    """(status, JSON body) of a call to the admin API."""
    url = f"{stack.ingresses[0].admin_url}/admin/api/profiles/{model}"
    async with session.request(method, url, json=value) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("headers", "decided"),
    [
        ({}, ("throughput", "calm")),
        ({"config-profile": "fast"}, ("least-latency", "fast")),
        ({"Config-Profile": " fast "}, ("least-latency", "fast")),
        ({"config-profile": "fast", "routing-strategy": "random"}, ("random", "fast")),
        ({"config-profile": "fixed", "routing-strategy": "random"}, ("round-robin", "fixed")),
        ({"config-profile": "auto"}, ("throughput", "calm")),
    ],
)
async def test_the_profile_decides_and_the_answer_names_it(
    stack: Stack, session: aiohttp.ClientSession, headers: dict[str, str], decided: tuple[str, str]
) -> None:
    status, answered, _ = await chat(session, stack.url, "hello", headers=headers)
    assert status == 200
    assert (answered["routing-strategy"], answered["config-profile"]) == decided


async def test_an_unknown_profile_is_a_400_that_lists_those_there_are(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    status, _, body = await chat(session, stack.url, "hello", headers={"config-profile": "slow"})
    assert status == 400
    assert (body["error"]["code"], body["error"]["param"]) == ("invalid_profile", "config-profile")
    assert body["error"]["message"].endswith("one of: auto, calm, default, fast, fixed, short")


async def test_a_prompt_that_is_too_long_for_every_instance_is_refused(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    headers = {"config-profile": "short"}
    status, _, body = await chat(session, stack.url, "word " * 100, headers=headers)
    assert (status, body["error"]["code"]) == (503, "no_available_instance")
    assert "prompt-length 2" in body["error"]["message"]


async def test_a_live_change_reaches_every_replica_and_goes_again(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    async def strategies() -> set[str]:
        answers = [await chat(session, stack.url, f"hello {n}") for n in range(8)]
        assert {status for status, _, _ in answers} == {200}
        return {headers["routing-strategy"] for _, headers, _ in answers}

    async def is_only(policy: str) -> bool:
        return await strategies() == {policy}

    value = {"profiles": {"calm": {"routing_strategy": "power-of-two"}}}
    status, body = await administer(stack, session, "PUT", value=value)
    assert (status, body["value"]) == (201, value)
    await eventually(lambda: is_only("power-of-two"))
    status, body = await administer(
        stack, session, "PUT", value={"profiles": {"calm": {"imbalance_ratio": -1}}}
    )
    assert (status, body["error"]["param"]) == (400, "profiles.calm.imbalance_ratio")
    # A policy that only a scheduler knows, or does not: the last good document counts on.
    fault = {"profiles": {"calm": {"routing_strategy": "fastest"}}}
    assert (await administer(stack, session, "PUT", value=fault))[0] == 200
    for scheduler in stack.schedulers:
        line = "profiles of sim-model .admin. cannot be used"
        await asyncio.to_thread(scheduler.wait_for_line, line)
    assert await strategies() == {"power-of-two"}
    assert (await administer(stack, session, "DELETE"))[0] == 200
    await eventually(lambda: is_only("throughput"))


def annotated(name: str, port: int, config: Any) -> Any:
    """A pod as AIBrix has it."""
    return pod(
        name,
        "127.0.0.1",
        ports={"http": port},
        labels={"model.aibrix.ai/name": MODEL, "model.aibrix.ai/port": str(port)},
        annotations={"model.aibrix.ai/config": config if isinstance(config, str) else json.dumps(config)},
    )


async def test_the_annotation_of_aibrix_pods_decides(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    def config(low: int, high: int) -> dict[str, Any]:
        lengths = {"promptLenBucketMinLength": low, "promptLenBucketMaxLength": high}
        return {
            "defaultProfile": "by-length",
            "profiles": {
                "by-length": {"routingStrategy": "random", "routingConfig": lengths},
                "throughput": {"routingStrategy": "throughput"},
            },
        }

    api = KubernetesStub(token="secret-token")
    await api.start()
    flags = ("--discovery-kubernetes-preset", "aibrix")
    kube = kubeconfig(tmp_path, api.url, token=api.token, namespace="default")
    try:
        with running_stack() as stack:
            await asyncio.to_thread(_start, stack, "--discovery-kubernetes-kubeconfig", str(kube), *flags)
            ports = [int(engine.rpartition(":")[2]) for engine in stack.engines]
            await api.put("pods", annotated("short", ports[0], config(0, 20)))
            await api.put("pods", annotated("long", ports[1], config(21, 0)))
            await stack.ready()

            async def targets(prompt: str, **headers: str) -> set[tuple[str, str]]:
                answers = [await chat(session, stack.url, prompt, headers=headers) for _ in range(6)]
                return {(h.get("target-pod", "?"), h.get("routing-strategy", "?")) for _, h, _ in answers}

            async def by_length() -> bool:
                short, long = await targets("hi"), await targets("word " * 100)
                return (short, long) == ({("short.default", "random")}, {("long.default", "random")})

            await eventually(by_length)
            by_header = await targets("hi", **{"config-profile": "throughput"})
            assert {strategy for _, strategy in by_header} == {"throughput"}
            await api.put("pods", annotated("short", ports[0], "{broken"))
            (scheduler,) = stack.schedulers
            await asyncio.to_thread(
                scheduler.wait_for_line, "profiles of sim-model .instances. cannot be used"
            )
            assert {strategy for _, strategy in await targets("word " * 100)} == {"random"}
    finally:
        await api.stop()


def _start(stack: Stack, *flags: str) -> None:
    stack.start_sims(2)
    stack.start_discovery_of("kubernetes", *flags)
    stack.start_scheduler()
    stack.start_ingress()
