"""The log as JSON lines: an event each, and manifests, which say what stands before them."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from penstock.cli import event_lines
from penstock.cli.audit.chains import Chains
from penstock.cli.audit.reading import part_of
from penstock.cli.event_lines import BrokenEvent
from penstock.common.bus import Stored

# A manifest each so many messages: what an export that was broken off has to do again.
MANIFEST_EVERY = 10_000
MANIFEST = b'{"manifest":'


class Manifest(msgspec.Struct, frozen=True):
    """What the file holds up to here: `last_sequence` is the last message of the stream, `sha256` is over all
    bytes before this line since the manifest before it (or the file's beginning)."""

    events: int
    messages: int
    first_sequence: int
    last_sequence: int
    until: float
    repeated: int
    broken: int
    sha256: str


class _Line(msgspec.Struct):
    manifest: Manifest


class Export:
    """A file, or the standard output; a context. Raises OSError."""

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        """A file that is there is not overwritten: with `resume` it goes on, else FileExistsError."""
        self._path = path
        self._total = Manifest(0, 0, 0, 0, 0.0, 0, 0, "")
        self._chains, self._hash = Chains(), hashlib.sha256()
        self._since = 0
        if path is None:
            self._file: IO[bytes] = sys.stdout.buffer
        elif resume and path.exists():
            self._file = path.open("r+b")
            self._rewind()
        else:
            self._file = path.open("xb")

    @property
    def after(self) -> int:
        """The stream's sequence that the file has come to."""
        return self._total.last_sequence

    @property
    def summary(self) -> str:
        """What there is, in words."""
        total = self._total
        parts = [f"{total.events} events of {total.messages} messages"]
        parts += [f"up to message {total.last_sequence} of the stream"] if total.messages else []
        parts += [f"{total.repeated} messages were there again and are left out"] if total.repeated else []
        parts += [f"{total.broken} messages are broken and left out"] if total.broken else []
        return ", ".join(parts)

    def take(self, message: Stored) -> None:
        """Write its events, unless they were written before."""
        total = self._total
        part = part_of(message, message.time_s)
        repeated = part is not None and not self._chains.is_new(part)
        if part is not None:
            self._chains.see(part)
        lines: list[bytes] = []
        broken = False
        if not repeated:
            try:
                events = event_lines.split(message.headers, message.payload)
                lines = [event_lines.as_json_line(raw).encode() + b"\n" for raw in events]
            except BrokenEvent:
                broken = True
        self._write(b"".join(lines))
        self._total = Manifest(
            total.events + len(lines),
            total.messages + 1,
            total.first_sequence or message.sequence,
            message.sequence,
            message.time_s,
            total.repeated + repeated,
            total.broken + broken,
            "",
        )
        self._since += 1
        if self._since >= MANIFEST_EVERY:
            self.manifest()

    def manifest(self) -> None:
        """Say what stands before."""
        whole = msgspec.structs.replace(self._total, sha256=self._hash.hexdigest())
        self._file.write(msgspec.json.encode(_Line(whole)) + b"\n")
        self._file.flush()
        self._hash, self._since = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError) if value is not None else contextlib.nullcontext():
                self._file.close()

    def _write(self, lines: bytes) -> None:
        self._file.write(lines)
        self._hash.update(lines)

    def _rewind(self) -> None:
        """To behind the last manifest; what follows it is written again."""
        at = whole = 0
        for line in self._file:
            at += len(line)
            if line.startswith(MANIFEST) and line.endswith(b"\n"):
                with contextlib.suppress(msgspec.MsgspecError):
                    self._total, whole = msgspec.json.decode(line, type=_Line).manifest, at
        self._file.seek(whole)
        self._file.truncate()
