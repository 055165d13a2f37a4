"""Files that people change while everything runs, read again when they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

MAX_FILE_BYTES = 1024 * 1024
POLL_S = 0.1


def read_bytes(path: Path) -> bytes:
    """Its content, or a byte more than MAX_FILE_BYTES of it. Raises OSError."""
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


async def follow_file(path: Path, poll_s: float = POLL_S) -> AsyncGenerator[bytes | str, None]:
    """Each content, the first included, for ever; in words why it cannot be read, once for each reason.

    A file put in the place of another (`mv`, a ConfigMap) is read at once; one that is written in place, once
    it has stood still from one look to the next. A file system that hangs holds this loop and one thread.
    """
    seen: tuple[int, ...] | None = None
    read: tuple[int, ...] | None = None
    last: bytes | str | None = None
    while True:
        content: bytes | str | None = None
        try:
            stamp = await asyncio.to_thread(_stamp, path)
            settled = seen is None or stamp == seen or stamp[:2] != seen[:2]
            seen = stamp
            if settled and stamp != read:
                content = await asyncio.to_thread(read_bytes, path)
                read = stamp
        except OSError as exc:
            read = None
            content = f"{path}: {exc.strerror or type(exc).__name__}"
        if content is not None and content != last:
            last = content
            yield content
        await asyncio.sleep(poll_s)


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
