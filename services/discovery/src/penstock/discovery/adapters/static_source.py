"""Instances that a person lists: in the settings, or in a file that is read again when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

from penstock.common.adapters.watched_file import WatchedFile, why_unreadable
from penstock.common.model import Instance
from penstock.common.records import PENSTOCK, RecordError, parse_record
from penstock.discovery.endpoints import listed_file, parse_listing
from penstock.discovery.ports import Source, SourceState, bounded
from penstock.discovery.settings import ENDPOINTS, DiscoverySettings

POLL_S = 0.1
MAX_FILE_BYTES = 16 * 1024 * 1024


class StaticSource:
    """Fulfils `ports.Source` with a list that never changes."""

    def __init__(self, name: str, instances: tuple[Instance, ...]) -> None:
        self.name = name
        self._instances = instances

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """The list, then silence."""
        yield SourceState(self._instances)
        await asyncio.Event().wait()

    async def refresh(self) -> None:
        """Nothing can have changed."""

    async def close(self) -> None:
        """Nothing is open."""


class FileSource:
    """Fulfils `ports.Source` with a file of endpoints and records, looked at every `poll_s` seconds.

    A file put in the place of another (`mv`, a ConfigMap) is read at once; one that is written in place,
    once it has stood still from one look to the next. Missing, unreadable and empty files leave the last
    list, marked stale: a file that is meant to list nothing says so with a comment.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        parse_record: Callable[[bytes], tuple[Instance, ...]],
        poll_s: float = POLL_S,
    ) -> None:
        self.name = name
        self._path, self._parse_record, self._poll_s = path, parse_record, poll_s
        self._file = WatchedFile(path, MAX_FILE_BYTES)
        self._asked = asyncio.Event()
        self._last: SourceState | None = None

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """A state for each content, and for each way in which the file cannot be used."""
        self._last = None
        self._file.forget()
        while True:
            state = await self._look()
            if state is not None and state != self._last:
                self._last = state
                yield state
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._asked.wait()
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Read it again, whatever its time stamp says."""
        self._asked.set()

    async def close(self) -> None:
        """Nothing is open."""

    async def _look(self) -> SourceState | None:
        """What the file lists, if it was read; its last list with the fault, if it cannot be used."""
        try:
            content = await self._file.look(again=self._asked.is_set())
            if content is None:
                return None
            self._asked.clear()
            return await asyncio.to_thread(self._parse, content.data)
        except (OSError, ValueError) as exc:
            self._asked.clear()
            return replace(self._last, stale=f"{self._path}: {why_unreadable(exc)}") if self._last else None

    def _parse(self, data: bytes) -> SourceState:
        if not data.strip():
            raise ValueError("it is empty; a comment (# none) says that no engine is meant")
        instances, faults = parse_listing(data.decode(), self._parse_record)
        return SourceState(tuple(instances.values()), bounded(faults))


def record_of_line(line: bytes) -> tuple[Instance, ...]:
    """The instances of a record in Penstock's own format; its time stamp counts for nothing here."""
    try:
        return parse_record("line", line, PENSTOCK).instances
    except RecordError as exc:
        raise ValueError(str(exc)) from exc


def endpoints_source(settings: DiscoverySettings) -> Source:
    """The source of --llm-backend-endpoints."""
    path = listed_file(settings.llm_backend_endpoints)
    if path:
        return FileSource(ENDPOINTS, Path(path), record_of_line)
    return StaticSource(ENDPOINTS, settings.endpoints)
