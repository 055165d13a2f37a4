"""A file that people and Kubernetes change while it is read: by writing into it, by replacing it, and by
turning the link that leads to it (a mounted ConfigMap)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# A file system that hangs (NFS) holds one thread, never the service.
READ_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Stamp:
    """What tells one content of a file from another without reading it."""

    file: tuple[int, int]
    changed: tuple[int, int, int]


@dataclass(frozen=True)
class Content:
    """What a file held, and when that was put there (Unix seconds)."""

    data: bytes
    modified_at: float


class WatchedFile:
    """Tells what a file holds whenever that may have changed.

    A file put in the place of another is read at once; one that is written in place, once it has stood still
    from one look to the next.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self._max_bytes = path, max_bytes
        # The content as it was last seen, and as it was last read.
        self._seen: _Stamp | None = None
        self._stood: _Stamp | None = None
        self._work: asyncio.Future[Any] | None = None

    def forget(self) -> None:
        """Tell the content again at the next look."""
        self._seen = self._stood = None

    async def look(self, *, again: bool = False) -> Content | None:
        """The content if it may have changed since it was told, or if it is to be told `again`.

        Raises:
            OSError, ValueError: it cannot be read or is too large; it is read again at the next look.
        """
        try:
            stamp = await self._in_thread(lambda: _stamp(self.path))
            settled = self._seen is None or stamp == self._seen or stamp.file != self._seen.file
            self._seen = stamp
            if not settled or (stamp == self._stood and not again):
                return None
            content = await self._in_thread(self._read)
        except (OSError, ValueError):
            self._stood = None
            raise
        self._stood = stamp
        return content

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._work is not None and not self._work.done():
            raise TimeoutError
        self._work = pending = asyncio.get_running_loop().run_in_executor(None, work)
        return await asyncio.wait_for(asyncio.shield(pending), READ_TIMEOUT_S)

    def _read(self) -> Content:
        with self.path.open("rb") as file:
            data = file.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise ValueError(f"it is over {self._max_bytes} bytes")
        return Content(data, self.path.stat().st_mtime)


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp((found.st_dev, found.st_ino), (found.st_mtime_ns, found.st_ctime_ns, found.st_size))


def why_unreadable(exc: OSError | ValueError) -> str:
    """In a few words."""
    match exc:
        case TimeoutError():
            return f"it cannot be read within {READ_TIMEOUT_S:g} s"
        case OSError():
            return exc.strerror or type(exc).__name__
        case UnicodeDecodeError():
            return "it is not UTF-8 text"
    return str(exc)
