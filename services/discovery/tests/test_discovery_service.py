"""The service on the memory bus, with real engines: what stands in the registry, whatever happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec import structs

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.bus import Change, Listing
from penstock.common.codec import encode_record
from penstock.common.config_keeping import ConfigWriter, follow_config
from penstock.common.errors import BusTimeout
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable, encode_instance, instance_key
from penstock.common.live_config import DRAIN, MAPPING, LiveConfig
from penstock.common.messages import DiscoverRequest, EngineStatus
from penstock.common.model import Endpoint, EngineLoad, Instance, Role
from penstock.common.subjects import DISCOVER, EVENTS, INSTANCES, STATUS
from penstock.common.telemetry import Metrics
from penstock.discovery.adapters.prober import http_prober
from penstock.discovery.adapters.static_source import StaticSource
from penstock.discovery.leases import LeaseRecord, lease_key
from penstock.discovery.ports import Source, SourceState
from penstock.discovery.reconcile import OWNER_LABEL
from penstock.discovery.service import Discovery
from penstock.discovery.surroundings import ProbePolicy, Timing

if TYPE_CHECKING:
    from services.discovery.tests.conftest import Engine

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
NewEngine = Callable[[], Awaitable["Engine"]]

POLICY = ProbePolicy(interval_s=0.02, rise=1, fall=2)
# A lease that no stall of the test's machine lets go of; the tests of takeover shorten it.
STEADY = Timing(lease_renew_s=0.05, lease_takeover_s=600.0, bucket_retry_s=0.02, write_retry_first_s=0.01)
BRISK = replace(STEADY, lease_takeover_s=0.3)


class ChangingSource:
    """A source that lists what a test tells it to; several replicas may read it."""

    def __init__(self, name: str = "changing") -> None:
        self.name = name
        self.asked = 0
        self._state: SourceState | None = None
        self._readers: list[asyncio.Event] = []

    def list(self, *instances: Instance, **said: Any) -> None:
        self._state = SourceState(instances, **said)
        for reader in self._readers:
            reader.set()

    async def states(self) -> AsyncGenerator[SourceState, None]:
        news = asyncio.Event()
        self._readers.append(news)
        while True:
            if self._state is not None:
                yield self._state
            await news.wait()
            news.clear()

    async def refresh(self) -> None:
        self.asked += 1

    async def close(self) -> None: ...


class Replica:
    """A discovery process on the memory bus."""

    def __init__(
        self,
        broker: MemoryBroker,
        sources: Iterable[Source],
        *,
        name: str,
        timing: Timing,
        timeout_s: float,
        policy: ProbePolicy,
    ) -> None:
        self.bus, self.metrics = MemoryBus(broker), Metrics()
        self.identity = Identity("discovery", name, f"{name}-run")
        self._sources, self._timing, self._timeout_s = sources, timing, timeout_s
        self._policy = policy
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        events = EventWriter(self.bus, self.identity.writer, self.identity.incarnation, self.metrics)
        self.discovery = Discovery(
            self._sources,
            await self._stack.enter_async_context(http_prober(self._timeout_s)),
            bus=self.bus,
            events=events,
            metrics=self.metrics,
            identity=self.identity,
            policy=self._policy,
            timing=self._timing,
        )
        loops = [*self.discovery.loops(), ("events", events.run())]
        self._tasks = [asyncio.create_task(work, name=name) for name, work in loops]

    async def stop(self) -> None:
        """As on SIGTERM."""
        await self.discovery.drain()
        await self.kill()

    async def kill(self) -> None:
        """Leave without a word; a loop that ended by itself is a fault."""
        ended = [task for task in self._tasks if task.done()]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self.discovery.close()
        await self._stack.aclose()
        assert not ended

    def count(self, name: str, *labels: str) -> float:
        return self.metrics.counter(name, "").labels(*labels).value

    def writes(self, result: str) -> float:
        return self.count("penstock_discovery_registry_writes_total", result)

    def gauge(self, name: str) -> dict[tuple[str, ...], float]:
        (family,) = [family for family in self.metrics.snapshot() if family.name == name]
        return {sample.labels: sample.value for sample in family.samples}


class Stage:
    """One bus, the replicas on it, and a consumer's table that follows the registry."""

    def __init__(self, eventually: Eventually) -> None:
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.table = InstanceTable()
        self.keys: list[str] = []
        self.sizes: set[int] = set()
        self.statuses: list[EngineStatus] = []
        self._eventually = eventually
        self._replicas: list[Replica] = []
        self.on_change: Callable[[], None] = lambda: None

    async def watch(self) -> None:
        async for event in self.bus.watch(INSTANCES):
            self.table.apply(event)
            self.sizes.add(len(self.table))
            self.on_change()
            if isinstance(event, Change):
                self.keys.append(event.key)
            elif isinstance(event, Listing):
                self.keys.append("listing")

    async def replica(self, *listed: Instance, **options: Any) -> Replica:
        return await self.replica_of(StaticSource("endpoints", listed), **options)

    async def replica_of(
        self,
        *sources: Source,
        name: str = "a",
        timing: Timing = STEADY,
        timeout_s: float = 5.0,
        policy: ProbePolicy = POLICY,
    ) -> Replica:
        replica = Replica(self.broker, sources, name=name, timing=timing, timeout_s=timeout_s, policy=policy)
        await replica.start()
        self._replicas.append(replica)
        return replica

    async def close(self) -> None:
        for replica in self._replicas:
            await replica.kill()

    async def until(self, check: Callable[[], object]) -> None:
        await self._eventually(check)

    def states(self) -> dict[str, str]:
        return {instance.id: str(instance.state) for instance in self.table.instances()}

    def record(self, instance: Instance) -> Instance:
        held = self.table.get(instance.id)
        assert held is not None
        return held

    def told(self) -> list[tuple[str, str, str]]:
        """(instance, change, reason) of every event in the routing log."""
        messages = [m for stream in self.broker.streams.values() for m in stream.messages]
        events = [event for m in messages for event in msgspec.json.decode(m.payload)]
        return [
            (event["subject"], event["data"]["change"], event["data"].get("reason", ""))
            for event in events
            if event["type"] == "penstock.instance.v1"
        ]


@pytest.fixture
async def stage(eventually: Eventually, new_engine: NewEngine) -> AsyncIterator[Stage]:
    # `new_engine` is named to end after it: an engine waits for the probes that are under way.
    stage = Stage(eventually)
    watch = asyncio.create_task(stage.watch(), name="consumer")
    yield stage
    await stage.close()
    assert not watch.done()
    watch.cancel()


def listed(engine: Engine, role: Role = Role.NEUTRAL) -> Instance:
    return Instance(id=str(engine.endpoint), endpoint=engine.endpoint, role=role)


async def test_a_healthy_engine_becomes_a_ready_record_and_then_the_source_is_complete(
    stage: Stage, engine: Engine
) -> None:
    engine.models = [{"id": "m", "owned_by": "vllm"}, {"id": "l", "parent": "m"}]
    replica = await stage.replica(listed(engine, Role.DECODE))
    await stage.until(lambda: stage.table.synced and not replica.discovery.missing())
    assert stage.record(listed(engine)) == Instance(
        id=f"127.0.0.1:{engine.port}",
        endpoint=Endpoint("127.0.0.1", engine.port),
        models=("m",),
        lora_adapters=("l",),
        owner="vllm",
        engine="vllm",
        role=Role.DECODE,
        source="endpoints",
    )
    written = [key for key in stage.keys if not key.startswith("lease.")]
    assert written == ["listing", instance_key(listed(engine).id), "complete.endpoints"]
    assert replica.gauge("penstock_discovery_instances") == {("ready", "endpoints"): 1.0}
    assert replica.gauge("penstock_discovery_lease_held") == {("endpoints",): 1.0}


async def test_the_load_of_a_healthy_engine_is_published(stage: Stage, engine: Engine) -> None:
    await stage.bus.subscribe(STATUS, stage.statuses.append)
    await stage.replica(listed(engine))
    await stage.until(lambda: stage.statuses)
    assert stage.statuses[0].instance == listed(engine).id
    assert stage.statuses[0].load == EngineLoad(running=3, waiting=1)


async def test_an_engine_that_fails_is_unhealthy_until_it_answers_again(stage: Stage, engine: Engine) -> None:
    await stage.replica(listed(engine))
    await stage.until(lambda: stage.states() == {listed(engine).id: "ready"})
    engine.health_status = 500
    await stage.until(lambda: stage.states() == {listed(engine).id: "unhealthy"})
    assert (stage.record(listed(engine)).models, stage.record(listed(engine)).reason) == (
        ("m",),
        "/health answers 500",
    )
    engine.health_status = 200
    await stage.until(lambda: stage.states() == {listed(engine).id: "ready"})
    changes = [
        (listed(engine).id, "added", ""),
        (listed(engine).id, "unhealthy", "/health answers 500"),
        (listed(engine).id, "recovered", ""),
    ]
    await stage.until(lambda: stage.told() == changes)


async def test_an_engine_that_serves_other_models_is_updated(stage: Stage, engine: Engine) -> None:
    await stage.replica(listed(engine))
    await stage.until(lambda: list(stage.table.models()) == ["m"])
    engine.models = [{"id": "n"}, {"id": "o"}]
    await stage.until(lambda: sorted(stage.table.models()) == ["n", "o"])
    await stage.until(lambda: (listed(engine).id, "updated", "") in stage.told())


async def test_bad_engines_neither_hide_good_ones_nor_keep_the_source_from_being_complete(
    stage: Stage, new_engine: NewEngine
) -> None:
    good, hanging, garbage, huge, redirecting, gone = [await new_engine() for _ in range(6)]
    hanging.answering.clear()
    garbage.models = b"{{{{"
    huge.body_bytes = 2 * 1024 * 1024
    redirecting.redirect_to = f"http://127.0.0.1:{good.port}/v1/models"
    await gone.stop()
    engines = (good, hanging, garbage, huge, redirecting, gone)
    replica = await stage.replica(*map(listed, engines), timeout_s=0.5)
    await stage.until(lambda: stage.table.synced and not replica.discovery.missing())
    states = {listed(engine).id: "unhealthy" for engine in engines}
    assert stage.states() == states | {listed(good).id: "ready"}
    faults = ("timeout", "malformed", "too_large", "redirect", "refused")
    counted = [replica.count("penstock_discovery_probe_failures_total", fault) for fault in faults]
    assert all(counted)


async def test_a_good_engine_is_listed_while_another_one_hangs(stage: Stage, new_engine: NewEngine) -> None:
    good, hanging = await new_engine(), await new_engine()
    hanging.answering.clear()
    replica = await stage.replica(listed(hanging), listed(good), timeout_s=600)
    await stage.until(lambda: stage.states() == {listed(good).id: "ready"})
    assert not stage.table.synced
    assert replica.discovery.missing() == "source endpoints: 1 instances wait for their first probe"


async def test_a_bucket_created_anew_is_written_again_and_its_consumers_miss_nothing(
    stage: Stage, new_engine: NewEngine
) -> None:
    engines = [listed(await new_engine()) for _ in range(3)]
    await stage.replica(*engines)
    await stage.until(lambda: stage.table.synced and len(stage.table) == 3)
    stage.keys.clear()
    stage.sizes.clear()
    stage.broker.drop_storage()
    await stage.until(lambda: "complete.endpoints" in stage.keys)
    rewritten = [key for key in stage.keys if key.startswith("instance.")]
    assert sorted(rewritten) == sorted(instance_key(instance.id) for instance in engines)
    assert stage.sizes == {3}


async def test_a_bucket_that_comes_back_ends_the_pause_after_a_failed_write(
    stage: Stage, engine: Engine
) -> None:
    replica = await stage.replica(
        listed(engine), timing=replace(STEADY, write_retry_first_s=600.0, write_retry_max_s=600.0)
    )
    await stage.until(lambda: stage.table.synced)
    # Gone, and the watch has not noticed.
    stage.broker.buckets[INSTANCES.name].exists = False
    engine.models = [{"id": "later"}]
    await stage.until(lambda: replica.writes("failed"))
    stage.broker.drop_storage()
    await stage.until(lambda: list(stage.table.models()) == ["later"])


async def test_engines_whose_metrics_hang_do_not_hold_up_the_checks(
    stage: Stage, new_engine: NewEngine
) -> None:
    slow, quick = await new_engine(), await new_engine()
    slow.hanging_path = "/metrics"
    replica = await stage.replica(
        listed(slow), listed(quick), timeout_s=600, policy=replace(POLICY, concurrency=1)
    )
    await stage.until(lambda: stage.states() == {listed(e).id: "ready" for e in (slow, quick)})
    await stage.until(lambda: slow.hits.get("/metrics"))
    probes = quick.hits["/health"]
    await stage.until(lambda: quick.hits["/health"] > probes + 3)
    assert replica.count("penstock_discovery_load_readings_total", "skipped") >= 1


async def test_what_happens_while_the_bus_is_away_is_in_the_registry_when_it_returns(
    stage: Stage, engine: Engine
) -> None:
    replica = await stage.replica(listed(engine))
    await stage.until(lambda: stage.states() == {listed(engine).id: "ready"})
    stage.broker.set_up(False)
    engine.models = [{"id": "later"}]
    await stage.until(lambda: [record.models for record in _kept(replica)] == [("later",)])
    assert replica.discovery.missing() == "no connection to the bus"
    stage.broker.set_up(True)
    await stage.until(lambda: list(stage.table.models()) == ["later"])
    await stage.until(lambda: not replica.discovery.missing())


def _kept(replica: Replica) -> list[Instance]:
    (keeper,) = replica.discovery.keepers
    return keeper.records()


async def test_a_bus_that_is_away_at_the_start_is_waited_for(stage: Stage, engine: Engine) -> None:
    stage.broker.set_up(False)
    replica = await stage.replica(listed(engine))
    assert replica.discovery.missing() == "no connection to the bus"
    stage.broker.set_up(True)
    await stage.until(lambda: stage.states() == {listed(engine).id: "ready"})


async def test_of_two_replicas_one_probes_and_writes_and_both_are_ready(stage: Stage, engine: Engine) -> None:
    first = await stage.replica(listed(engine), name="a")
    await stage.until(lambda: stage.table.synced)
    second = await stage.replica(listed(engine), name="b")
    await stage.until(lambda: not first.discovery.missing() and not second.discovery.missing())
    engine.models = [{"id": "later"}]
    await stage.until(lambda: list(stage.table.models()) == ["later"])
    assert (first.writes("written"), second.writes("written")) == (3.0, 0.0)
    assert second.metrics.histogram("penstock_discovery_probe_seconds", "").labels().counts == [0] * 17
    assert second.gauge("penstock_discovery_lease_held") == {("endpoints",): 0.0}


async def test_a_replica_takes_over_when_the_holder_stops_renewing(stage: Stage, engine: Engine) -> None:
    first = await stage.replica(listed(engine), name="a", timing=BRISK)
    await stage.until(lambda: stage.table.synced)
    await first.kill()
    engine.models = [{"id": "later"}]
    second = await stage.replica(listed(engine), name="b", timing=BRISK)
    await stage.until(lambda: list(stage.table.models()) == ["later"])
    assert second.writes("written") == 1.0


async def test_a_clean_stop_keeps_the_records_and_lets_a_successor_start_at_once(
    stage: Stage, engine: Engine
) -> None:
    first = await stage.replica(listed(engine), name="a")
    await stage.until(lambda: stage.table.synced)
    await first.stop()
    assert stage.states() == {listed(engine).id: "ready"}
    engine.models = [{"id": "later"}]
    await stage.replica(listed(engine), name="b")
    await stage.until(lambda: list(stage.table.models()) == ["later"])


async def test_a_restart_that_changes_nothing_is_complete_after_one_round(
    stage: Stage, engine: Engine
) -> None:
    first = await stage.replica(listed(engine), name="a")
    await stage.until(lambda: stage.table.synced)
    await first.stop()
    # No renewal of the lease comes to wake the writer by chance.
    second = await stage.replica(listed(engine), name="b", timing=replace(STEADY, lease_renew_s=300.0))
    await stage.until(lambda: not second.discovery.missing())
    assert second.writes("written") == 0


async def test_a_source_that_changes_its_list_adds_and_removes_instances(
    stage: Stage, new_engine: NewEngine
) -> None:
    stays, goes, comes = [await new_engine() for _ in range(3)]
    source = ChangingSource()
    replica = await stage.replica_of(source)
    await stage.until(lambda: replica.discovery.missing() == "source changing: it has listed nothing yet")
    source.list(listed(stays), listed(goes))
    await stage.until(lambda: stage.states() == {listed(e).id: "ready" for e in (stays, goes)})
    source.list(listed(stays), listed(comes))
    await stage.until(lambda: stage.states() == {listed(e).id: "ready" for e in (stays, comes)})
    probes_of_removed, probes_of_kept = goes.hits["/health"], stays.hits["/health"]
    await stage.until(lambda: stays.hits["/health"] > probes_of_kept + 5)
    assert goes.hits["/health"] <= probes_of_removed + 1


async def test_a_restart_goes_on_with_the_states_that_the_registry_holds(
    stage: Stage, engine: Engine
) -> None:
    first = await stage.replica(listed(engine), name="a")
    await stage.until(lambda: stage.table.synced)
    await first.stop()
    engine.answering.clear()
    stage.keys.clear()
    second = await stage.replica(listed(engine), name="b", timeout_s=0.1)
    await stage.until(lambda: stage.states() == {listed(engine).id: "unhealthy"})
    assert second.count("penstock_discovery_probe_failures_total", "timeout") >= POLICY.fall
    assert stage.keys.count(instance_key(listed(engine).id)) == 1


async def test_a_restart_with_another_list_removes_what_it_does_not_name(
    stage: Stage, new_engine: NewEngine
) -> None:
    kept, dropped = listed(await new_engine()), listed(await new_engine())
    first = await stage.replica(kept, dropped, name="a")
    await stage.until(lambda: stage.table.synced and len(stage.table) == 2)
    await first.stop()
    second = await stage.replica(kept, name="b")
    await stage.until(lambda: stage.states() == {kept.id: "ready"})
    assert second.writes("deleted") == 1.0
    await stage.until(lambda: (dropped.id, "removed", "its source does not list it") in stage.told())


async def test_records_of_another_source_are_left_alone(stage: Stage, engine: Engine) -> None:
    other = Instance(id="other", endpoint=Endpoint("other", 1), models=("x",), source="elsewhere")
    await stage.bus.ensure_bucket(INSTANCES)
    await stage.bus.put(INSTANCES, instance_key(other.id), encode_instance(other))
    replica = await stage.replica(listed(engine))
    await stage.until(lambda: not replica.discovery.missing())
    await stage.until(lambda: stage.states() == {"other": "ready", listed(engine).id: "ready"})
    assert replica.writes("deleted") == 0


async def test_a_record_that_somebody_else_overwrites_or_deletes_is_written_again(
    stage: Stage, engine: Engine
) -> None:
    await stage.replica(listed(engine))
    await stage.until(lambda: stage.table.synced)
    right, key = encode_instance(stage.record(listed(engine))), instance_key(listed(engine).id)
    held = stage.broker.buckets[INSTANCES.name].entries
    await stage.bus.put(INSTANCES, key, b"garbage")
    await stage.until(lambda: held[key].value == right)
    await stage.bus.delete(INSTANCES, key)
    await stage.until(lambda: key in held and held[key].value == right)


async def test_a_holder_that_was_replaced_stops_probing_and_writing(stage: Stage, engine: Engine) -> None:
    replica = await stage.replica(listed(engine))
    await stage.until(lambda: not replica.discovery.missing())
    usurper = encode_record(LeaseRecord("b", "b-run", 1))
    await stage.bus.put(INSTANCES, lease_key("endpoints"), usurper)
    await stage.until(lambda: replica.gauge("penstock_discovery_lease_held") == {("endpoints",): 0.0})
    await stage.until(lambda: not _kept(replica))
    written = replica.writes("written")
    await stage.bus.delete(INSTANCES, instance_key(listed(engine).id))
    await stage.until(lambda: stage.states() == {})
    assert replica.writes("written") == written
    assert not replica.discovery.missing()


async def test_garbage_in_the_bucket_hurts_nobody(stage: Stage, engine: Engine) -> None:
    await stage.bus.ensure_bucket(INSTANCES)
    garbage: dict[str, Any] = {
        instance_key("x"): b"\xff\xfe",
        instance_key(listed(engine).id): b"[]",
        "complete.endpoints": b"{",
        "unknown.key": b"",
    }
    for key, value in garbage.items():
        await stage.bus.put(INSTANCES, key, value)
    replica = await stage.replica(listed(engine))
    await stage.until(lambda: not replica.discovery.missing() and stage.table.synced)
    assert stage.states() == {listed(engine).id: "ready"}


async def test_a_source_that_lists_nothing_is_complete_at_once(stage: Stage) -> None:
    replica = await stage.replica()
    await stage.until(lambda: stage.table.synced and not replica.discovery.missing())
    assert stage.states() == {}


def sources_of(stage: Stage) -> dict[str, str]:
    return {instance.id: instance.source for instance in stage.table.instances()}


async def test_the_first_source_speaks_for_an_instance_and_the_next_one_when_it_lets_go(
    stage: Stage, engine: Engine
) -> None:
    first, second = ChangingSource("first"), ChangingSource("second")
    replica = await stage.replica_of(first, second)
    one = listed(engine)
    second.list(msgspec.structs.replace(one, role=Role.DECODE))
    first.list()
    await stage.until(lambda: sources_of(stage) == {one.id: "second"} and stage.table.synced)
    stage.sizes.clear()
    first.list(one)
    await stage.until(lambda: sources_of(stage) == {one.id: "first"})
    assert replica.gauge("penstock_discovery_source_overruled") == {("first",): 0.0, ("second",): 1.0}
    first.list()
    await stage.until(lambda: sources_of(stage) == {one.id: "second"})
    second.list()
    await stage.until(lambda: not sources_of(stage))
    assert stage.sizes == {1, 0}
    await stage.until(lambda: [change for _, change, _ in stage.told()][-1:] == ["removed"])
    assert [change for _, change, _ in stage.told()] == ["added", "updated", "updated", "removed"]


async def test_the_static_list_wins_wherever_it_stands(stage: Stage, engine: Engine) -> None:
    found = ChangingSource("redis")
    found.list(msgspec.structs.replace(listed(engine), role=Role.PREFILL))
    await stage.replica_of(found, StaticSource("endpoints", (listed(engine),)))
    await stage.until(lambda: stage.table.synced)
    assert (sources_of(stage), stage.record(listed(engine)).role) == (
        {listed(engine).id: "endpoints"},
        Role.NEUTRAL,
    )


async def test_replicas_that_disagree_on_the_order_of_sources_stop_fighting(
    stage: Stage, engine: Engine
) -> None:
    first, second = ChangingSource("first"), ChangingSource("second")
    first.list(listed(engine))
    second.list(listed(engine))
    one = await stage.replica_of(first, second, name="a")
    await stage.until(lambda: not one.discovery.missing())
    # Another process took one of the leases; its settings name the sources the other way round.
    await stage.bus.put(INSTANCES, lease_key("second"), encode_record(LeaseRecord("b", "b-run", 1)))
    await stage.until(lambda: one.gauge("penstock_discovery_lease_held")[("second",)] == 0)
    right = encode_instance(stage.record(listed(engine)))
    theirs = encode_instance(msgspec.structs.replace(stage.record(listed(engine)), source="second"))
    held, key = stage.broker.buckets[INSTANCES.name].entries, instance_key(listed(engine).id)
    for _ in range(3):
        await stage.bus.put(INSTANCES, key, theirs)
        await stage.until(lambda: held[key].value == right)
    await stage.bus.put(INSTANCES, key, theirs)
    written, renewed = one.writes("written"), held[lease_key("first")].revision
    await stage.until(lambda: held[lease_key("first")].revision > renewed + 2)
    assert (held[key].value, one.writes("written")) == (theirs, written)


async def test_a_source_that_cannot_be_read_is_told_and_its_instances_serve_on_as_stale(
    stage: Stage, engine: Engine
) -> None:
    source, one = ChangingSource(), listed(engine)
    replica = await stage.replica_of(source)
    source.list(one)
    await stage.until(lambda: stage.states() == {one.id: "ready"})
    source.list(one, stale="connection refused\nby the store")
    await stage.until(lambda: stage.states() == {one.id: "stale"})
    assert stage.record(one).takes_work
    assert replica.gauge("penstock_discovery_source_stale") == {("changing",): 1.0}
    assert replica.count("penstock_discovery_source_outages_total", "changing") == 1
    assert not replica.discovery.missing()
    source.list(one)
    await stage.until(lambda: stage.states() == {one.id: "ready"})
    changes = ["added", "stale", "recovered"]
    await stage.until(lambda: [change for _, change, _ in stage.told()] == changes)


async def test_a_restart_while_the_store_is_away_keeps_what_stands_and_calls_it_stale(
    stage: Stage, engine: Engine
) -> None:
    source, one = ChangingSource(), listed(engine)
    source.list(one)
    before = await stage.replica_of(source)
    await stage.until(lambda: stage.table.synced)
    await before.stop()
    silent = ChangingSource()
    timing = replace(STEADY, silent_start_s=0.1)
    after = await stage.replica_of(silent, name="b", timing=timing)
    await stage.until(lambda: stage.states() == {one.id: "stale"})
    assert after.discovery.missing() == "source changing: it has listed nothing yet"
    silent.list(one)
    await stage.until(lambda: not after.discovery.missing())
    assert stage.states() == {one.id: "ready"}


async def test_bad_records_are_told_once_counted_and_harm_no_other(stage: Stage, engine: Engine) -> None:
    source, one = ChangingSource(), listed(engine)
    replica = await stage.replica_of(source)
    forbidden = Instance(id="meta", endpoint=Endpoint("169.254.169.254", 80))
    for _ in range(3):
        source.list(one, forbidden, skipped={"key\n1": "not JSON"})
        await stage.until(lambda: stage.states() == {one.id: "ready"})
        source.list(one, forbidden, skipped={"key\n1": "not JSON"}, stale="away")
        await stage.until(lambda: stage.states() == {one.id: "stale"})
    skipped = [(key, reason) for key, change, reason in stage.told() if change == "skipped"]
    assert skipped == [
        ("key\ufffd1", "not JSON"),
        ("meta", "169.254.169.254 is a link-local or metadata address; --discovery-allow-cidr may allow it"),
    ]
    assert replica.count("penstock_discovery_skipped_records_total", "changing") == 2
    assert replica.gauge("penstock_discovery_source_skipped") == {("changing",): 2.0}


async def test_a_source_that_ends_or_raises_is_asked_anew(stage: Stage, engine: Engine) -> None:
    class Broken(ChangingSource):
        async def states(self) -> AsyncGenerator[SourceState, None]:
            self.asked += 1
            if self.asked == 1:
                raise RuntimeError("a fault of the source")
            yield SourceState((listed(engine),))
            if self.asked == 2:
                await broken.wait()
                raise RuntimeError("a fault of the source")
            await asyncio.Event().wait()

    broken = asyncio.Event()
    await stage.replica_of(Broken())
    await stage.until(lambda: stage.states() == {listed(engine).id: "ready"})
    broken.set()
    await stage.until(lambda: stage.states() == {listed(engine).id: "stale"})
    await stage.until(lambda: stage.states() == {listed(engine).id: "ready"})


async def test_a_refresh_asks_every_source(stage: Stage) -> None:
    sources = ChangingSource("one"), ChangingSource("two")
    replica = await stage.replica_of(*sources)
    await replica.discovery.refresh()
    assert [source.asked for source in sources] == [1, 1]


async def test_records_of_a_source_that_no_replica_runs_any_more_are_removed_after_a_while(
    stage: Stage, new_engine: NewEngine
) -> None:
    stays, goes = listed(await new_engine()), listed(await new_engine())
    both = await stage.replica_of(StaticSource("endpoints", (stays,)), StaticSource("old", (goes,)))
    await stage.until(lambda: stage.table.synced and len(stage.table) == 2)
    await both.stop()
    timing = replace(STEADY, forget_source_s=0.3, orphan_check_s=0.02)
    await stage.replica(stays, name="b", timing=timing)
    await stage.until(lambda: stage.states() == {stays.id: "ready"})
    reason = "no replica of discovery ran source old for 0.3 s"
    await stage.until(lambda: (goes.id, "removed", reason) in stage.told())
    assert "complete.old" not in stage.broker.buckets[INSTANCES.name].entries


async def test_another_address_under_the_same_id_is_one_update_without_a_gap(
    stage: Stage, new_engine: NewEngine
) -> None:
    old, new = await new_engine(), await new_engine()
    source = ChangingSource()
    await stage.replica_of(source)
    for engine in (old, new):
        moved = Instance(id="a", endpoint=engine.endpoint)
        source.list(moved)
        await stage.until(lambda: [i.endpoint for i in stage.table.instances()] == [moved.endpoint])  # noqa: B023  # awaited in its round
    await stage.until(lambda: [change for _, change, _ in stage.told()] == ["added", "updated"])
    assert stage.sizes <= {0, 1}
    assert stage.keys.count(instance_key("a")) == 2


# -- orders of administrators -----------------------------------------------------------------------------


async def administrator(stage: Stage) -> tuple[ConfigWriter, asyncio.Task[None]]:
    """Somebody who writes live configuration, and the loop that follows it for him."""
    config = LiveConfig(keeps=True)
    task = asyncio.create_task(follow_config(stage.bus, config))
    await stage.until(lambda: config.synced)
    return ConfigWriter(stage.bus, config), task


async def test_what_an_administrator_drains_takes_no_work_until_he_takes_it_back(
    stage: Stage, engine: Engine
) -> None:
    instance = listed(engine)
    await stage.replica(instance)
    await stage.until(lambda: stage.states() == {instance.id: "ready"})
    admin, follower = await administrator(stage)
    await admin.put(DRAIN, instance.id, {"reason": "new driver"}, "ops", "admin")
    await stage.until(lambda: stage.states() == {instance.id: "draining"})
    await admin.delete(DRAIN, instance.id, "ops", "admin")
    await stage.until(lambda: stage.states() == {instance.id: "ready"})
    reason = "drained by ops: new driver"
    wanted = [(instance.id, "added", ""), (instance.id, "draining", reason), (instance.id, "recovered", "")]
    await stage.until(lambda: stage.told() == wanted)
    follower.cancel()


async def test_a_drain_outlives_discovery_and_is_never_lifted_for_a_moment(
    stage: Stage, engine: Engine
) -> None:
    instance = listed(engine)
    admin, follower = await administrator(stage)
    await admin.put(DRAIN, instance.id, {}, "ops", "admin")
    first = await stage.replica(instance)
    await stage.until(lambda: stage.states() == {instance.id: "draining"})
    await first.stop()
    seen: set[str] = set()
    stage.on_change = lambda: seen.update(stage.states().values())
    second = await stage.replica(instance, name="b", timing=BRISK)
    await stage.until(lambda: not second.discovery.missing() and second.discovery.keepers[0].held)
    assert seen <= {"draining"}
    await admin.delete(DRAIN, instance.id, "ops", "admin")
    await stage.until(lambda: stage.states() == {instance.id: "ready"})
    await stage.until(lambda: [change for _, change, _ in stage.told()].count("recovered") == 1)
    follower.cancel()


async def test_a_mapping_says_whose_a_model_is_and_survives_listing_again(
    stage: Stage, engine: Engine
) -> None:
    instance = listed(engine)
    replica = await stage.replica(instance)
    admin, follower = await administrator(stage)
    value = {"model": "m", "owned_by": "team", "service_name": str(engine.endpoint)}
    await admin.put(MAPPING, "team/m", value, "ops", "admin")
    await stage.until(lambda: [i.owned_by("m") for i in stage.table.instances()] == ["team"])
    await replica.discovery.refresh()
    await replica.stop()
    await stage.replica(instance, name="b")
    await stage.until(lambda: stage.keys.count("listing") and stage.record(instance).owned_by("m") == "team")
    await admin.delete(MAPPING, "team/m", "ops", "admin")
    await stage.until(lambda: stage.record(instance).owned_by("m") == "vllm")
    follower.cancel()


async def test_whoever_asks_hears_what_listing_again_found(stage: Stage, new_engine: NewEngine) -> None:
    one, other = listed(await new_engine()), listed(await new_engine())

    class Asked(ChangingSource):
        async def refresh(self) -> None:
            self.list(other)

    source = Asked()
    await stage.replica_of(source)
    source.list(one)
    await stage.until(lambda: stage.states() == {one.id: "ready"})
    reply = await stage.bus.request(DISCOVER, DiscoverRequest(), deadline_s=5)
    assert (reply.done, reply.discovered, reply.replica) == (False, 1, "a")
    replies = [reply]

    async def ask() -> None:
        again = DiscoverRequest(reply.ticket, "a")
        while not replies[-1].done:
            replies.append(await stage.bus.request(DISCOVER, again, deadline_s=5))

    await asyncio.wait_for(ask(), 10)
    found = replies[-1]
    assert (found.discovered, found.added, found.removed, found.unchanged) == (1, (other.id,), (one.id,), 0)
    with pytest.raises(BusTimeout):
        await stage.bus.request(DISCOVER, DiscoverRequest("1", "another"), deadline_s=0.05)


async def test_an_instance_whose_metrics_alone_say_its_engine_is_told_once(
    stage: Stage, engine: Engine
) -> None:
    engine.models = [{"id": "m"}]
    instance = listed(engine)
    replica = await stage.replica(instance)
    await stage.until(lambda: stage.states() == {instance.id: "ready"})
    await stage.until(lambda: engine.hits.get("/metrics", 0) > 3 and not replica.discovery.missing())
    assert (stage.record(instance).engine, stage.record(instance).owner) == ("vllm", "vllm")
    await stage.until(lambda: stage.told() == [(instance.id, "added", "")])


def told_degraded(stage: Stage) -> list[tuple[str, bool, str]]:
    """What the routing log holds of things that are missing."""
    held = stage.broker.streams.get(EVENTS.name)
    events = [event for message in (held.messages if held else ()) for event in json.loads(message.payload)]
    data = [event["data"] for event in events if event["type"] == "penstock.degraded.v1"]
    return [(one["what"], one["active"], one.get("cause", "")) for one in data]


async def test_figures_that_are_none_are_counted_and_told_once_until_they_make_sense_again(
    stage: Stage, engine: Engine
) -> None:
    engine.metrics = "vllm:num_requests_running NaN\nvllm:num_requests_waiting -3\n"
    replica = await stage.replica(listed(engine))
    await stage.until(
        lambda: replica.count("penstock_discovery_absurd_figures_total", "vllm:num_requests_waiting") > 2
    )
    engine.metrics = "vllm:num_requests_running 1\n"
    await stage.until(lambda: len(told_degraded(stage)) == 2)
    what = f"load of {listed(engine).id}"
    cause = "no number of requests or share: vllm:num_requests_running, vllm:num_requests_waiting"
    assert told_degraded(stage) == [(what, True, cause), (what, False, "")]


async def test_an_owner_is_said_by_record_label_model_list_or_engine(
    stage: Stage, new_engine: NewEngine
) -> None:
    said, labelled, told, silent = [await new_engine() for _ in range(4)]
    silent.models = [{"id": "m"}]
    instances = (
        structs.replace(listed(said), owner="record", labels={OWNER_LABEL: "label"}),
        structs.replace(listed(labelled), labels={OWNER_LABEL: "label"}),
        listed(told),
        structs.replace(listed(silent), engine="trtllm"),
    )
    await stage.replica(*instances)
    await stage.until(lambda: len(stage.table) == 4)
    owners = [stage.record(instance).owner for instance in instances]
    assert owners == ["record", "label", "vllm", "trtllm"]
