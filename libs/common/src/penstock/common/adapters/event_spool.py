"""The spool on disk: what a process writes of the routing log, until the stream holds it.

A folder for each run of a process, in it segments that are only ever appended to, and a lock that is held
while the process lives. Frames are length and CRC-32, little-endian u32 each, and a MessagePack record. Each
segment begins with the requests that were open, so that whoever finds the folder of a dead process knows
what it was doing.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from penstock.common.errors import SpoolFault
from penstock.common.event_batches import Message, Place, SpooledMessage
from penstock.common.routing_events import Admission

log = logging.getLogger(__name__)

SYNC_EVERY_S = 1.0
Fsync = Literal["never", "second", "always"]
SEGMENT_BYTES = 4 * 1024 * 1024
MAX_FRAME_BYTES = 16 * 1024 * 1024
_FRAME = struct.Struct("<II")
_LOCK, _SUFFIX = "lock", ".segment"


class SpooledOpen(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """Requests that were open when the segment was begun."""

    requests: list[Admission]


Record = SpooledMessage | SpooledOpen
_encode = msgspec.msgpack.Encoder().encode
_records: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class DiskSpool:
    """The spool of this process. Every call may raise SpoolFault: the disk refuses."""

    def __init__(self, root: Path, writer: str, incarnation: str, max_bytes: int, fsync: Fsync) -> None:
        """Make the folder `<writer>.<incarnation>` below `root`; `max_bytes` bounds what it holds."""
        name = f"{writer.replace('/', '-')}.{incarnation}"
        self._folder = root / name
        self._max_bytes, self._fsync = max_bytes, fsync
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 4)
        self._sizes: dict[int, int] = {}
        # Messages of each segment that the stream is not known to hold.
        self._unstored: dict[int, int] = {}
        self._current, self._file = 0, -1
        self._dirty = False
        # Full segments that the disk may not hold yet.
        self._unsynced: list[int] = []
        try:
            # Locked before it has the name by which others find it.
            making = root / f".{name}"
            making.mkdir(parents=True, mode=0o700)
            self._lock = _locked(making)
            making.rename(self._folder)
        except OSError as exc:
            raise SpoolFault(f"{self._folder}: {exc.strerror or exc}") from exc

    @property
    def held_bytes(self) -> int:
        """What its files take."""
        return sum(self._sizes.values())

    def write(self, messages: Sequence[Message], opened: Callable[[], list[Admission]]) -> int:
        """Append messages with one write, and note their places; the number of the first segment that is
        still there: where there was no room, older ones went."""
        frames = [
            _frame(SpooledMessage(m.number, m.subject, m.headers, m.payload, m.first, m.last))
            for m in messages
        ]
        size = sum(map(len, frames))
        try:
            if self._file < 0 or self._sizes[self._current] + size > self._segment_bytes:
                self._turn(opened())
            offset = self._sizes[self._current]
            self._append(b"".join(frames))
        except OSError as exc:
            raise SpoolFault(exc.strerror or str(exc)) from exc
        for message, frame in zip(messages, frames, strict=True):
            message.place = Place(self._current, offset, len(frame))
            offset += len(frame)
        self._unstored[self._current] += len(messages)
        return self._make_room()

    def load(self, place: Place) -> SpooledMessage:
        """A message that is on disk alone."""
        try:
            with self._path(place.segment).open("rb") as file:
                data = os.pread(file.fileno(), place.length, place.offset)
        except OSError as exc:
            raise SpoolFault(exc.strerror or str(exc)) from exc
        record = _unframe(data)
        if not isinstance(record, SpooledMessage):
            raise SpoolFault(f"segment {place.segment} does not hold what was written")
        return record

    def stored(self, place: Place) -> None:
        """The stream holds this message; a segment of which it holds all goes."""
        segment = place.segment
        if segment not in self._unstored:
            return
        self._unstored[segment] -= 1
        if not self._unstored[segment] and segment != self._current:
            self._drop(segment)

    def to_sync(self) -> list[int]:
        """File descriptors to be given to `sync`, in another thread: what was written since the last time,
        where the policy is `second`."""
        files, self._unsynced = self._unsynced, []
        if self._dirty and self._file >= 0 and self._fsync == "second":
            files.append(os.dup(self._file))
        self._dirty = False
        return files

    def close(self, *, stored: bool) -> None:
        """Let go of it; `stored`: the stream holds everything, so that nobody needs the folder."""
        sync(self.to_sync())
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if stored:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _append(self, data: bytes) -> None:
        """All of it or nothing: what a full disk took of it is cut off again."""
        at = self._sizes[self._current]
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(28, "no room for all of a batch")
            if self._fsync == "always":
                os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, at)
            raise
        self._sizes[self._current] = at + len(data)
        self._dirty = True

    def _turn(self, opened: list[Admission]) -> None:
        number = self._current + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        file = os.open(self._path(number), flags, 0o600)
        done, self._current, old = self._current, number, self._file
        self._file, self._sizes[number], self._unstored[number] = file, 0, 0
        if old >= 0 and self._dirty and self._fsync == "second":
            self._unsynced.append(old)
        elif old >= 0:
            os.close(old)
        self._append(_frame(SpooledOpen(opened)))
        if not self._unstored.get(done, 1):
            self._drop(done)

    def _make_room(self) -> int:
        while self.held_bytes > self._max_bytes and len(self._sizes) > 1:
            self._drop(min(self._sizes))
        return min(self._sizes)

    def _drop(self, segment: int) -> None:
        try:
            self._path(segment).unlink(missing_ok=True)
        except OSError as exc:
            log.warning("segment %d of the spool stays on disk: %s", segment, exc)
        del self._sizes[segment], self._unstored[segment]

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:08d}{_SUFFIX}"


def sync(files: Sequence[int]) -> None:
    """Have the disk hold what is in these files, and close them. Raises SpoolFault."""
    for file in files:
        try:
            os.fdatasync(file)
        except OSError as exc:
            raise SpoolFault(exc.strerror or str(exc)) from exc
        finally:
            os.close(file)


async def keep_synced(spool: DiskSpool) -> None:
    """The policy `second`: what was written is on the disk a second later; until cancelled."""
    while True:
        await asyncio.sleep(SYNC_EVERY_S)
        if files := spool.to_sync():
            try:
                await asyncio.to_thread(sync, files)
            except SpoolFault as exc:
                log.error("the spool cannot be synced: %s", exc)


class Leftover:
    """The spool of a process that is dead, held by nobody else while it is looked after."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.name = folder.name
        self._folder, self._lock = folder, lock
        self.torn = ""

    def records(self) -> Iterator[Record]:
        """What it holds, oldest first; `torn` says where a segment is not whole. Raises SpoolFault."""
        try:
            for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
                with path.open("rb") as file:
                    while head := file.read(_FRAME.size):
                        record = self._read(file.read, head)
                        if record is None:
                            self.torn = f"{path.name} is damaged at byte {file.tell()}"
                            break
                        yield record
        except OSError as exc:
            raise SpoolFault(exc.strerror or str(exc)) from exc

    def _read(self, read: Callable[[int], bytes], head: bytes) -> Record | None:
        if len(head) < _FRAME.size:
            return None
        length, _ = _FRAME.unpack(head)
        if length > MAX_FRAME_BYTES:
            return None
        return _unframe(head + read(length))

    def remove(self) -> None:
        """It is looked after."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Leave it to others."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def leftovers(root: Path, service: str) -> Iterator[Leftover]:
    """Spools of dead processes of a service, each locked for the caller."""
    try:
        folders = sorted(root.glob(f"{service}-*.*"))
    except OSError as exc:
        log.warning("the spools in %s cannot be listed: %s", root, exc)
        return
    for folder in folders:
        try:
            lock = _locked(folder) if folder.is_dir() else None
        except OSError as exc:
            log.debug("the spool %s cannot be locked: %s", folder, exc)
            continue
        if lock is not None:
            yield Leftover(folder, lock)


def _locked(folder: Path) -> int | None:
    """A file descriptor that holds the folder's lock; None if a living process does. Raises OSError."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _frame(record: Record) -> bytes:
    body = _encode(record)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _unframe(frame: bytes) -> Record | None:
    """What a frame holds; None if it is not whole."""
    if len(frame) < _FRAME.size:
        return None
    length, checksum = _FRAME.unpack_from(frame)
    body = frame[_FRAME.size :]
    if len(body) != length or zlib.crc32(body) != checksum:
        return None
    try:
        return _records.decode(body)
    except msgspec.MsgspecError:
        return None
