"""Requests follow the pods that Kubernetes shows, through a whole stack."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from integration.kubernetes_lab import EVERYTHING, kubeconfig
from integration.kubernetes_objects_made import pod_of
from integration.kubernetes_stub import KubernetesStub
from integration.servers import eventually
from integration.source_contract import instance
from integration.stack import Stack, chat, running_stack

pytestmark = pytest.mark.integration


async def test_requests_go_to_the_pods_that_are_there_and_ready(tmp_path: Path) -> None:
    api = KubernetesStub(token="secret-token")
    await api.start()
    config = kubeconfig(tmp_path, api.url, token=api.token, namespace="default")
    try:
        with running_stack() as stack:
            await asyncio.to_thread(_start, stack, config)
            await api.put("pods", _pod(stack, 0))
            await stack.ready()
            async with aiohttp.ClientSession() as session:

                async def served_by(name: str) -> bool:
                    status, headers, _ = await chat(session, stack.url, "hello")
                    assert status == 200
                    return headers["target-pod"] == name

                assert await served_by("engine-0.default")
                await api.put("pods", _pod(stack, 1))
                await eventually(lambda: served_by("engine-1.default"))
                leaving = _pod(stack, 1)
                leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                await api.put("pods", leaving)
                await eventually(lambda: served_by("engine-0.default"))
                await api.put("pods", _pod(stack, 1))
                await eventually(lambda: served_by("engine-1.default"))
                await api.delete("pods", "engine-0")

                async def only_the_second() -> bool:
                    return all([await served_by("engine-1.default") for _ in range(5)])

                await eventually(only_the_second)
            assert stack.discovery is not None
            assert stack.discovery.find("secret-token") is None
    finally:
        await api.stop()


def _start(stack: Stack, config: Path) -> None:
    stack.start_sims(2)
    flags = ("--discovery-kubernetes-kubeconfig", str(config), "--discovery-kubernetes-selector", EVERYTHING)
    stack.start_discovery_of("kubernetes", *flags)
    stack.start_scheduler("--default-routing-strategy", "round-robin")
    stack.start_ingress()


def _pod(stack: Stack, number: int) -> Any:
    port = int(stack.engines[number].rpartition(":")[2])
    return pod_of(instance(f"engine-{number}", port))
