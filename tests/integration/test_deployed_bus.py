"""The committed configuration of NATS and its generated accounts, with the environment of the manifests: each
program does its work as its own user, and an auditor reads the log and can do nothing else."""

from __future__ import annotations

import asyncio
from functools import partial

import aiohttp
import nats
import pytest
from nats.aio.client import Client

from integration.bus_users import Guest
from integration.deployed_bus import INJECTED, K8S, DeployedStack, deployed_stack, secrets
from integration.servers import Process, eventually
from integration.stack import chat, metric, stream_chat
from integration.test_up import penstock
from penstock.common.subjects import (
    CONFIG,
    COPIES,
    EVENTS,
    HEARTBEAT,
    INSTANCES,
    LOAD,
    SCHEDULE,
    event_filter,
    event_subject,
)

pytestmark = pytest.mark.integration

READY_S = 60.0
HEADERS = {"authorization": f"Bearer {secrets()['admin-token']}"}


async def test_each_program_works_with_its_own_user_and_an_auditor_only_reads() -> None:
    with deployed_stack(1) as stack:
        stack.start_sims(2)
        sidecar = registered(stack)
        stack.start_discovery_of("nats")
        stack.start_scheduler()
        stack.start_mirror(K8S / "base" / "mirror.json")
        ingress = stack.start_ingress()
        async with aiohttp.ClientSession() as session:
            await stack.ready()
            status, headers, _ = await chat(session, stack.url, "hello")
            assert (status, headers["routing-strategy"]) == (200, "cache-aware")
            payloads = [payload async for payload in stream_chat(session, stack.url, "hello")]
            assert payloads[-1] == "[DONE]"
            assert await metric(session, ingress.admin_port, "penstock_registry_taking_work") == 2
            await live_configuration_is_written(session, ingress.admin_url)
        for process in (sidecar, *stack.schedulers, *stack.mirrors):
            assert process.exit_code is None
        for process in (*stack.schedulers, *stack.mirrors, ingress.process):
            assert process.find(f'"warning".*environment variable {INJECTED} is not a setting')
        await tapped(stack)
        assert stack.bus.forbidden() == []
        await auditors_are_refused(stack)


def registered(stack: DeployedStack) -> Process:
    """The sidecar of all engines, as the user `register`."""
    password = {"PENSTOCK_NATS_USER": "register", "PENSTOCK_NATS_PASSWORD": secrets()["nats-register"]}
    process = Process.module(
        "penstock.discovery.register",
        *("--store", "nats", "--admin-port", "0", "--engine", ",".join(stack.engines)),
        env={**password, "PENSTOCK_NATS_URL": stack.bus.url()},
    )
    return stack.exits.enter_context(process)


async def live_configuration_is_written(session: aiohttp.ClientSession, admin: str) -> None:
    """An ingress writes the bucket, with the token that the manifests give it."""
    url = f"{admin}/admin/api/users/alice"

    async def written() -> bool:
        async with session.put(url, json={"rpm": 5}, headers=HEADERS) as response:
            assert response.status < 300, await response.text()
        return True

    await eventually(written, READY_S)


async def tapped(stack: DeployedStack) -> None:
    with penstock(
        "tap", "--nats-url", stack.events_url, "--since", "10m", "--json", "--type", "outcome", "--count", "2"
    ) as tap:
        await asyncio.to_thread(tap.assert_exit, 0, READY_S)


async def auditors_are_refused(stack: DeployedStack) -> None:
    """Everything but the events."""
    refusals: list[str] = []

    async def note(exc: Exception) -> None:
        refusals.append(str(exc))

    client = await nats.connect(stack.events_url, error_cb=note)
    guest = Guest(client, refusals)
    for subject in (
        event_subject("placement", "m"),
        SCHEDULE.request.name("0"),
        HEARTBEAT.name("discovery"),
        CONFIG.subject("user.alice"),
        f"$JS.API.STREAM.DELETE.{EVENTS.name}",
        f"$JS.API.STREAM.INFO.{EVENTS.name}",
        f"$JS.API.DIRECT.GET.{INSTANCES.stream}",
    ):
        assert await guest.refused(partial(Client.publish, subject=subject, reply="_INBOX.guest")), subject
    for subject in (LOAD.pattern, SCHEDULE.request.pattern, COPIES.subjects[0], ">"):
        assert await guest.refused(partial(Client.subscribe, subject=subject)), subject
    assert not await guest.refused(partial(Client.subscribe, subject=event_filter()))
    await client.close()
