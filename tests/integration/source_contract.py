"""What every source of discovery does, whatever its store; and the lab that a store brings along.

A file of tests makes its store's suite by a subclass with a `lab` fixture:

    class TestRedis(SourceContract):
        @pytest.fixture
        async def lab(self) -> AsyncIterator[StoreLab]: ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec

from integration.servers import eventually
from penstock.common.model import Endpoint, Instance, Role
from penstock.discovery.ports import Source, SourceState

PATIENCE_S = 60.0


class StoreLab(Protocol):
    """A real store that one test has for itself, and what can happen to it."""

    outages: Sequence[str]
    """Ways in which the store can go away: `stopped` (nobody listens), `frozen` (connections are accepted
    and never answered), and others of its own. Empty for a store that cannot go away."""

    grace: bool
    """Whether a store that lost its data keeps its instances for a while."""

    carries: frozenset[str]
    """Fields of Instance that a record of this store can say, besides id and endpoint."""

    def id_of(self, name: str) -> str:
        """The id under which the source lists what was put as instance `name`; `name` where ids are free."""

    def source(self) -> Source:
        """A source that reads this store, with short intervals and time limits (well below 1 s)."""

    async def put(self, *instances: Instance) -> None:
        """Write or overwrite the records of these, as whoever registers instances does."""

    async def delete(self, instance_id: str) -> None:
        """Remove a record."""

    async def put_garbage(self) -> str:
        """Write a record that nobody can read; part of the key under which it is told as skipped."""

    async def delete_garbage(self) -> None:
        """Remove it."""

    async def away(self, how: str) -> None:
        """The store goes away in one of the ways of `outages`; returns when it is away."""

    async def back(self) -> None:
        """It answers again, with all its data."""

    async def lose_data(self) -> None:
        """It restarts, or is, empty."""

    async def close(self) -> None:
        """End it."""


def instance(name: str = "a", port: int = 8000, **fields: Any) -> Instance:
    """An instance as it is registered; `fields` are those of Instance."""
    made = Instance(id=name, endpoint=Endpoint("127.0.0.1", port))
    return msgspec.structs.replace(made, **fields)


class Reader:
    """Follows a source as discovery does."""

    def __init__(self, lab: StoreLab) -> None:
        self._lab = lab
        self.source = source = lab.source()
        self.states: list[SourceState] = []
        self._task = asyncio.create_task(self._follow(), name=f"reader of {source.name}")

    async def _follow(self) -> None:
        async for state in self.source.states():
            self.states.append(state)
        raise AssertionError("the states ended")

    @property
    def last(self) -> SourceState:
        """The state as it is; an empty one before the first."""
        return self.states[-1] if self.states else SourceState(())

    @property
    def listed(self) -> dict[str, Instance]:
        """The instances by id."""
        assert not self._task.done(), self._task.exception()
        ids = [found.id for found in self.last.instances]
        assert len(ids) == len(set(ids)), f"an id is listed twice: {sorted(ids)}"
        return {found.id: found for found in self.last.instances}

    def find(self, name: str) -> Instance:
        """What was put as `name`."""
        return self.listed[self._lab.id_of(name)]

    def lists(self, *names: str) -> bool:
        """Whether there was a state, and the last one lists exactly what was put as these."""
        return bool(self.states) and self.listed.keys() == {*map(self._lab.id_of, names)}

    async def until(self, *names: str) -> None:
        """Exactly these are listed."""
        await eventually(lambda: self.lists(*names), PATIENCE_S)

    async def until_like(self, wanted: Instance, *fields: str) -> None:
        """What was put is listed with these fields."""

        def alike() -> bool:
            found = self.find(wanted.id)
            return all(getattr(found, name) == getattr(wanted, name) for name in fields)

        await eventually(alike, PATIENCE_S)

    async def until_stale(self, stale: bool) -> None:
        await eventually(lambda: self.states and bool(self.last.stale) is stale, PATIENCE_S)

    async def close(self) -> None:
        running = not self._task.done()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.source.close()
        assert running, "the states ended or raised"


@asynccontextmanager
async def reading(lab: StoreLab) -> AsyncIterator[Reader]:
    """A new source and its reader, for as long as the context lasts."""
    reader = Reader(lab)
    try:
        yield reader
    finally:
        await reader.close()


class SourceContract:
    """The behaviour suite."""

    async def test_what_is_in_the_store_is_listed_at_once(self, lab: StoreLab) -> None:
        await lab.put(instance("a"), instance("b", 8001))
        async with reading(lab) as reader:
            await eventually(lambda: reader.states, PATIENCE_S)
            assert reader.lists("a", "b")
            assert (reader.last.stale, dict(reader.last.skipped)) == ("", {})

    async def test_an_empty_store_lists_nothing_and_says_so(self, lab: StoreLab) -> None:
        async with reading(lab) as reader:
            await eventually(lambda: reader.states, PATIENCE_S)
            assert (reader.listed, reader.last.stale) == ({}, "")

    async def test_a_record_that_comes_or_goes_is_seen(self, lab: StoreLab) -> None:
        await lab.put(instance("a"))
        async with reading(lab) as reader:
            await reader.until("a")
            await lab.put(instance("b", 8001))
            await reader.until("a", "b")
            await lab.delete("a")
            await reader.until("b")

    async def test_a_record_says_what_its_store_can_carry(self, lab: StoreLab) -> None:
        said: dict[str, Any] = {
            "models": ("m",),
            "lora_adapters": ("l",),
            "owner": "vllm",
            "role": Role.DECODE,
            "engine": "vllm",
            "group": "g",
            "dp_rank": 1,
            "dp_size": 2,
            "kv_address": "127.0.0.1:9000",
            "bootstrap_port": 8998,
            "labels": {"zone": "z"},
            "weight": 2.0,
        }
        said = {name: value for name, value in said.items() if name in lab.carries}
        await lab.put(instance("a", **said))
        async with reading(lab) as reader:
            await reader.until("a")
            found = {name: getattr(reader.find("a"), name) for name in said}
            assert (reader.find("a").endpoint, found) == (Endpoint("127.0.0.1", 8000), said)

    async def test_what_changes_under_the_same_id_is_listed_anew(self, lab: StoreLab) -> None:
        await lab.put(instance("a"))
        changed: dict[str, Any] = {"role": Role.PREFILL, "models": ("n",), "labels": {"k": "v"}}
        fields: dict[str, Any] = {}
        async with reading(lab) as reader:
            await reader.until("a")
            for name in ("endpoint", *(name for name in changed if name in lab.carries)):
                if name in changed:
                    fields[name] = changed[name]
                await lab.put(instance("a", 8002, **fields))
                await reader.until_like(instance("a", 8002, **fields), "endpoint", *fields)

    async def test_many_records_are_listed_together(self, lab: StoreLab) -> None:
        many = [instance(f"i{n}", 9000 + n) for n in range(300)]
        await lab.put(*many)
        async with reading(lab) as reader:
            await reader.until(*(one.id for one in many))
            await lab.delete("i7")
            await reader.until(*(one.id for one in many if one.id != "i7"))

    async def test_a_record_that_nobody_can_read_is_named_and_harms_no_other(self, lab: StoreLab) -> None:
        await lab.put(instance("a"))
        key = await lab.put_garbage()
        async with reading(lab) as reader:
            await reader.until("a")
            await eventually(lambda: any(key in named for named in reader.last.skipped), PATIENCE_S)
            assert all(reader.last.skipped.values())
            await lab.put(instance("b", 8001))
            await reader.until("a", "b")
            await lab.delete_garbage()
            await eventually(lambda: not reader.last.skipped, PATIENCE_S)
            await reader.until("a", "b")

    async def test_a_store_that_goes_away_leaves_its_last_list_marked_stale(self, lab: StoreLab) -> None:
        await lab.put(instance("a"), instance("b", 8001))
        async with reading(lab) as reader:
            await reader.until("a", "b")
            for how in lab.outages:
                await lab.away(how)
                # A source need not notice before it next asks.
                await reader.source.refresh()
                await reader.until_stale(True)
                assert reader.lists("a", "b"), how
                await lab.back()
                await reader.until_stale(False)
                await reader.until("a", "b")
            await lab.put(instance("c", 8002))
            await reader.until("a", "b", "c")

    async def test_a_store_that_is_away_at_the_start_lists_nothing_until_it_is_there(
        self, lab: StoreLab
    ) -> None:
        if not lab.outages:
            return
        await lab.put(instance("a"))
        await lab.away(lab.outages[0])
        async with reading(lab) as reader:
            await reader.source.refresh()
            await lab.back()
            await reader.until("a")
            assert all(state.instances for state in reader.states), "it said that the store is empty"

    async def test_a_store_that_lost_its_data_is_filled_again(self, lab: StoreLab) -> None:
        await lab.put(instance("a"), instance("b", 8001))
        async with reading(lab) as reader:
            await reader.until("a", "b")
            await lab.lose_data()
            await reader.source.refresh()
            if not lab.grace:
                await reader.until()
            await lab.put(instance("a"), instance("b", 8001), instance("c", 8002))
            await reader.until("a", "b", "c")
            if lab.grace:
                assert all(len(state.instances) >= 2 for state in reader.states), "it was emptied meanwhile"

    async def test_asking_again_and_closing_twice_harm_nothing(self, lab: StoreLab) -> None:
        await lab.put(instance("a"))
        async with reading(lab) as reader:
            await reader.until("a")
            for _ in range(20):
                await reader.source.refresh()
            await lab.put(instance("b", 8001))
            await reader.until("a", "b")
        await reader.source.close()

    async def test_a_source_that_is_closed_leaves_no_task_behind(self, lab: StoreLab) -> None:
        await lab.put(instance("a"))
        before = asyncio.all_tasks()
        async with reading(lab) as reader:
            await reader.until("a")
        await eventually(lambda: not asyncio.all_tasks() - before, PATIENCE_S)
