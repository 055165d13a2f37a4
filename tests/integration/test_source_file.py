"""The source contract on a file of endpoints, and what only a file can do. About 10 s."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from integration.servers import eventually
from integration.source_contract import SourceContract, instance, reading
from penstock.common.model import Instance
from penstock.common.records import PENSTOCK, write_record
from penstock.discovery.adapters.static_source import FileSource, record_of_line
from penstock.discovery.ports import Source


class FileLab:
    """A file with one record a line, replaced at every change."""

    outages: Sequence[str] = ("missing", "folder", "empty", "not text")
    grace = False
    carries = frozenset(
        {
            "models",
            "lora_adapters",
            "owner",
            "role",
            "engine",
            "group",
            "dp_rank",
            "dp_size",
            "kv_address",
            "bootstrap_port",
            "labels",
            "weight",
        }
    )

    def __init__(self, folder: Path, poll_s: float = 0.02) -> None:
        self.path, self._poll_s = folder / "engines", poll_s
        self._instances: dict[str, Instance] = {}
        self._more: list[str] = []
        self.write()

    def id_of(self, name: str) -> str:
        return name

    def source(self) -> Source:
        return FileSource("endpoints", self.path, record_of_line, self._poll_s)

    def write(self) -> None:
        lines = [write_record((one,), 0, PENSTOCK).decode() for one in self._instances.values()]
        fresh = self.path.with_name("engines.new")
        fresh.write_text("\n".join(["# engines", *lines, *self._more, ""]))
        fresh.replace(self.path)

    async def put(self, *instances: Instance) -> None:
        self._instances |= {one.id: one for one in instances}
        self.write()

    async def delete(self, instance_id: str) -> None:
        del self._instances[instance_id]
        self.write()

    async def put_garbage(self) -> str:
        self._more = ['{"id": '] if not self._more else self._more
        self.write()
        return f"line {len(self._instances) + 2}"

    async def delete_garbage(self) -> None:
        self._more = []
        self.write()

    async def away(self, how: str) -> None:
        self.path.unlink()
        match how:
            case "folder":
                self.path.mkdir()
            case "empty":
                self.path.touch()
            case "not text":
                self.path.write_bytes(b"\xff\xfe")

    async def back(self) -> None:
        if self.path.is_dir():
            self.path.rmdir()
        self.write()

    async def lose_data(self) -> None:
        self._instances = {}
        self.write()

    async def close(self) -> None:
        """Nothing runs."""


class TestFile(SourceContract):
    @pytest.fixture
    def lab(self, tmp_path: Path) -> FileLab:
        return FileLab(tmp_path)


async def test_lines_of_endpoints_stand_beside_records(tmp_path: Path) -> None:
    lab = FileLab(tmp_path)
    record = json.loads(write_record((instance("r"),), 0, PENSTOCK))
    lab.path.write_text(f"a:1, prefill@b:2  # two\n\n{json.dumps(record)}\nc:0\n")
    async with reading(lab) as reader:
        await reader.until("a:1", "b:2", "r")
        assert reader.find("b:2").role == "prefill"
        assert list(reader.last.skipped) == ["line 4"]


async def test_a_file_that_is_written_in_place_is_read_once_it_stands_still(tmp_path: Path) -> None:
    lab = FileLab(tmp_path)
    async with reading(lab) as reader:
        await reader.until()
        with lab.path.open("a") as file:
            file.write("a:1\n")
        await reader.until("a:1")


async def test_a_file_that_a_link_leads_to_elsewhere_is_read_anew(tmp_path: Path) -> None:
    """As Kubernetes changes a mounted ConfigMap."""
    lab = FileLab(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"{name}:1\n")
    lab.path.unlink()
    lab.path.symlink_to(tmp_path / "one")
    async with reading(lab) as reader:
        await reader.until("one:1")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "two")
        link.replace(lab.path)
        await reader.until("two:1")
        await eventually(lambda: not reader.last.stale)
