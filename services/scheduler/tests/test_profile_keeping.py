"""Config profiles of a running scheduler: changed live, told in the log, the last good ones kept."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.common.config_keeping import ConfigWriter, follow_config
from penstock.common.followed_file import follow_file
from penstock.common.instances import encode_instance, instance_key
from penstock.common.live_config import PROFILE, LiveConfig
from penstock.common.messages import Placement, Reason, Rejection
from penstock.common.model import Endpoint, Instance
from penstock.common.settings import SettingsError, load
from penstock.common.subjects import INSTANCES
from penstock.scheduler.settings import SchedulerSettings

from .scheduler_service_lab import ask, events_of, eventually, register, replica, request, wire


def strategy(name: str, **more: Any) -> dict[str, Any]:
    return {"profiles": {"default": {"routing_strategy": name, **more}}}


def replace(path: Path, text: str) -> None:
    """As `mv` does, and a ConfigMap."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


async def policy_of(client: Any, **more: Any) -> str:
    (outcome,) = (await ask(client, request(os.urandom(4).hex(), **more))).outcomes
    return outcome.policy if isinstance(outcome, Placement) else outcome.reason.value


async def decides(client: Any, policy: str, **more: Any) -> None:
    """Wait until requests are decided by it."""
    async with asyncio.timeout(30):
        while await policy_of(client, **more) != policy:  # noqa: ASYNC110  # there is no event for it
            await asyncio.sleep(0.005)


async def test_a_document_reaches_every_replica_and_a_bad_one_leaves_the_last() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    config = LiveConfig(keeps=True)
    keeping = asyncio.create_task(follow_config(client, config))
    try:
        async with replica(broker, "s1") as one, replica(broker, "s2") as two:
            both = one, two
            await eventually(lambda: config.synced and one.serving and two.serving)
            writer = ConfigWriter(client, config)
            await writer.put(PROFILE, "m", strategy("throughput"), "ops", "admin")
            await eventually(
                lambda: [one.count("penstock_scheduler_profile_models") for one in both] == [1, 1]
            )
            for _ in range(4):
                await decides(client, "throughput")
            await writer.put(PROFILE, "m", strategy("fastest"), "ops", "admin")
            await eventually(
                lambda: [one.count("penstock_scheduler_profile_faults") for one in both] == [1, 1]
            )
            assert await policy_of(client) == "throughput"
            told = [one["data"] for one in await events_of(client, "degraded", 2)]
            assert {one["id"] for one in told} == {"s1", "s2"}
            assert all(one["what"] == "profiles of m (admin)" and one["active"] for one in told)
            assert all("unknown routing strategy 'fastest'" in one["cause"] for one in told)
            await writer.delete(PROFILE, "m", "ops", "admin")
            await eventually(
                lambda: [one.count("penstock_scheduler_profile_faults") for one in both] == [0, 0]
            )
            await decides(client, "cache-aware")
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_a_file_is_followed_and_each_change_is_an_event(tmp_path: Path) -> None:
    path = tmp_path / "profiles.yaml"
    path.write_text("m: {profiles: {default: {routing_strategy: throughput}}}", encoding="utf-8")
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker, profiles_file=path) as running:
        await eventually(lambda: running.serving)
        await decides(client, "throughput")
        replace(path, "m: {profiles: {default: {routing_strategy: random, locked: true}}}")
        await decides(client, "random", strategy="throughput")
        replace(path, "m: {profiles: {default: {routing_strategy: 3}}}")
        await eventually(lambda: running.count("penstock_scheduler_profile_faults") == 1)
        assert await policy_of(client, strategy="throughput") == "random"
        (told,) = await events_of(client, "degraded", 1)
        assert "m: profiles.default.routing_strategy" in told["data"]["cause"]
        path.unlink()
        await eventually(lambda: running.count("penstock_scheduler_profile_faults") == 1)
        replace(path, "")
        await decides(client, "cache-aware")
        changes = [one["data"] for one in await events_of(client, "config", 2)]
        assert [(one["kind"], one["name"], one["change"]) for one in changes] == [
            ("profile", "m", "updated"),
            ("profile", "m", "deleted"),
        ]
        assert {(one["by"], one["origin"]) for one in changes} == {("s1", "file")}
        assert changes[0]["version"] < changes[1]["version"]


async def test_instances_bring_profiles_and_their_disagreement_is_an_event() -> None:
    broker, client = wire()
    await register(client, "a", "b")

    async def annotate(name: str, policy: str) -> None:
        config = json.dumps({"profiles": {"default": {"routingStrategy": policy}}})
        instance = Instance(id=name, endpoint=Endpoint("h", 1), models=("m",), source="test", config=config)
        await client.put(INSTANCES, instance_key(name), encode_instance(instance))

    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        await annotate("b", "throughput")
        await decides(client, "throughput")
        await annotate("a", "least-latency")
        await decides(client, "least-latency")
        (told,) = await events_of(client, "degraded", 1)
        assert told["data"]["what"] == "profiles of m (instances)"
        assert told["data"]["cause"] == "1 of 2 instances disagree (b); what a says counts"
        await annotate("b", "least-latency")
        ended = (await events_of(client, "degraded", 2))[1]["data"]
        assert (ended["what"], ended["active"]) == ("profiles of m (instances)", False)


async def test_an_unknown_profile_is_refused() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        (outcome,) = (await ask(client, request("d", profile="fast"))).outcomes
        assert isinstance(outcome, Rejection)
        assert outcome.reason is Reason.BAD_PROFILE
        assert msgspec.structs.replace(outcome, message="").retry_after_s == 0


async def test_a_file_written_in_place_is_read_once_it_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "profiles.yaml"
    path.write_text("1", encoding="utf-8")
    contents = follow_file(path, poll_s=0.005)
    assert await anext(contents) == b"1"
    path.write_text("22", encoding="utf-8")
    assert await anext(contents) == b"22"
    path.unlink()
    assert "No such file" in str(await anext(contents))
    path.write_text("22", encoding="utf-8")
    assert await anext(contents) == b"22"
    await contents.aclose()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("m: {profiles: {a: {imbalance_requests: 0}}}", "imbalance_requests: .* greater than 0, got 0"),
        (
            "m: {profiles: {a: {routing_strategy: fastest}}}",
            "m: profiles.a.routing_strategy: unknown routing",
        ),
        ("[]", "a mapping of models"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_stops_the_start(tmp_path: Path, text: str | None, fault: str) -> None:
    path = tmp_path / "profiles.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=f"--profiles-file {path}: .*{fault}"):
        load(SchedulerSettings, ("--profiles-file", str(path)), prog="scheduler", environ={})
