"""Instances that a person lists: in the settings, or in a file that is read again when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from penstock.common.model import Instance
from penstock.common.records import PENSTOCK, RecordError, parse_record
from penstock.discovery.endpoints import listed_file, parse_listing
from penstock.discovery.ports import Source, SourceState, bounded
from penstock.discovery.settings import ENDPOINTS, DiscoverySettings

T = TypeVar("T")

POLL_S = 0.1
MAX_FILE_BYTES = 16 * 1024 * 1024
# A file system that hangs (NFS) holds one thread, never the service.
READ_TIMEOUT_S = 5.0


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


@dataclass(frozen=True)
class _Stamp:
    """What tells one content of a file from another without reading it."""

    file: tuple[int, int]
    changed: tuple[int, int, int]


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
        self._asked = asyncio.Event()
        self._last: SourceState | None = None
        # The content as it was last seen, and as it was last read.
        self._seen: _Stamp | None = None
        self._stood: _Stamp | None = None
        self._work: asyncio.Future[Any] | None = None

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """A state for each content, and for each way in which the file cannot be used."""
        self._last = self._seen = self._stood = None
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
            stamp = await self._in_thread(lambda: _stamp(self._path))
            settled = self._seen is None or stamp == self._seen or stamp.file != self._seen.file
            self._seen = stamp
            if not settled or (stamp == self._stood and not self._asked.is_set()):
                return None
            self._asked.clear()
            state = await self._in_thread(self._read)
            self._stood = stamp
            return state
        except (OSError, ValueError) as exc:
            self._asked.clear()
            self._stood = None
            return replace(self._last, stale=f"{self._path}: {_why(exc)}") if self._last else None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._work is not None and not self._work.done():
            raise TimeoutError
        self._work = pending = asyncio.get_running_loop().run_in_executor(None, work)
        return await asyncio.wait_for(asyncio.shield(pending), READ_TIMEOUT_S)

    def _read(self) -> SourceState:
        with self._path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if not data.strip():
            raise ValueError("it is empty; a comment (# none) says that no engine is meant")
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it is over {MAX_FILE_BYTES} bytes")
        instances, faults = parse_listing(data.decode(), self._parse_record)
        return SourceState(tuple(instances.values()), bounded(faults))


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp((found.st_dev, found.st_ino), (found.st_mtime_ns, found.st_ctime_ns, found.st_size))


def _why(exc: OSError | ValueError) -> str:
    match exc:
        case TimeoutError():
            return f"it cannot be read within {READ_TIMEOUT_S:g} s"
        case OSError():
            return exc.strerror or type(exc).__name__
        case UnicodeDecodeError():
            return "it is not UTF-8 text"
    return str(exc)


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
