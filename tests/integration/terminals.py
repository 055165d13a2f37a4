"""A process on a terminal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import weakref
from collections.abc import Sequence
from typing import Self

from integration.servers import eventually_sync

_ENTER, _LEAVE, _HOME = "\x1b[?1049h", "\x1b[?1049l", "\x1b[H"
_STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _take_terminal() -> None:
    """Changes of size and Ctrl-C go to the session that the terminal controls."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """Runs `argv` on a pseudo-terminal of so many columns and lines; leaving the context kills it."""

    def __init__(self, argv: Sequence[str], columns: int, lines: int) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns, lines)
        self.settings = termios.tcgetattr(theirs)
        self._theirs = theirs
        self._heard = b""
        self._process = subprocess.Popen(
            list(argv),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")},
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509  # one call of the kernel, no lock of Python's
        )
        self._finalizer = weakref.finalize(self, self._process.kill)
        threading.Thread(target=self._listen, daemon=True).start()

    def resize(self, columns: int, lines: int) -> None:
        """Another size, of which the process is told."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Keys, as typed."""
        os.write(self._ours, keys.encode())

    @property
    def heard(self) -> str:
        """All that was written so far."""
        return self._heard.decode("utf-8", "replace")

    def frame(self) -> list[str]:
        """Lines of the last whole frame, as a reader sees them."""
        frames = self.heard.split(_HOME)
        return [_STEERING.sub("", line) for line in frames[-2].splitlines()] if len(frames) > 2 else []

    def ended(self, timeout_s: float = 10.0) -> int:
        """Its exit code."""
        return self._process.wait(timeout_s)

    def now_settings(self) -> list[object]:
        """The terminal's modes."""
        return list(termios.tcgetattr(self._theirs))

    def left_as_found(self) -> bool:
        """The first screen is shown again, with its modes."""
        return _LEAVE in self.heard.rpartition(_ENTER)[2] and self.now_settings() == self.settings

    def hang_up(self) -> None:
        """The terminal is closed."""
        self._process.send_signal(1)

    def wait(self, pattern: str, timeout_s: float = 20.0) -> None:
        """Return once the last frame has a match."""

        def seen() -> bool:
            assert re.search(pattern, "\n".join(self.frame())), f"no {pattern!r} in:\n{self.heard[-3000:]}"
            return True

        eventually_sync(seen, timeout_s)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 65536):
                self._heard += data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finalizer()
        self._process.wait()
        os.close(self._theirs)
