"""Etcd as the store of a source, for the contract of all sources."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from integration.etcd_lab import EtcdLab, Writer
from penstock.common.model import Instance
from penstock.common.records import PENSTOCK, write_record
from penstock.common.settings import load
from penstock.discovery.adapters.etcd_source import Pace, etcd_source
from penstock.discovery.ports import Source
from penstock.discovery.settings import DiscoverySettings

PREFIX = "penstock/discovery/"
PACE = Pace(prove_every_s=0.2, stale_after_s=0.3, retry_max_s=0.2)


def written(one: Instance, age_s: float = 0.0) -> bytes:
    """A record of one instance, in Penstock's format."""
    return write_record([one], int((time.time() - age_s) * 1000), PENSTOCK)


class EtcdStore:
    """Fulfils `source_contract.StoreLab` on a cluster that outlives it, and is left empty."""

    outages: Sequence[str] = ("stopped", "frozen")
    grace = True
    carries = frozenset(Instance.__struct_fields__) - {"id", "endpoint", "state", "reason", "source"}

    def __init__(self, etcd: EtcdLab, *flags: str, pace: Pace = PACE, endpoints: str = "") -> None:
        """`flags` are added to those of discovery."""
        self.etcd, self.writer, self.pace = etcd, Writer(etcd), pace
        self._flags = ("--discovery-etcd-endpoints", endpoints or etcd.endpoints, *flags)
        self._how = ""

    def id_of(self, name: str) -> str:
        return name

    def source(self) -> Source:
        argv = ["--llm-backend-discovery", "etcd", *self._flags]
        if "--discovery-etcd-dial-timeout" not in argv:
            argv += ["--discovery-etcd-dial-timeout", "0.5"]
        settings = load(DiscoverySettings, argv, prog="penstock discovery", environ={})
        return etcd_source(settings, self.pace)

    async def put(self, *instances: Instance) -> None:
        await self.writer.put({PREFIX + one.id: written(one) for one in instances})

    async def delete(self, instance_id: str) -> None:
        await self.writer.delete(PREFIX + instance_id)

    async def put_garbage(self) -> str:
        await self.writer.put({PREFIX + "garbage": b"\x00\xff{"})
        return PREFIX + "garbage"

    async def delete_garbage(self) -> None:
        await self.delete("garbage")

    async def away(self, how: str) -> None:
        self._how = how
        for member in self.etcd.members:
            member.freeze() if how == "frozen" else member.kill()

    async def back(self) -> None:
        if self._how == "frozen":
            for member in self.etcd.members:
                member.thaw()
        elif self._how:
            await asyncio.to_thread(self.etcd.start)
        self._how = ""

    async def lose_data(self) -> None:
        await asyncio.to_thread(self.etcd.restart_empty)

    async def close(self) -> None:
        await self.back()
        await self.writer.delete_all()
