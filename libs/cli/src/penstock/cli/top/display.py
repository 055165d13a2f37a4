"""The terminal: its second screen, its size, its keys; and everything as it was at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
# Of a terminal that does not tell, or tells 0.
_COLUMNS, _LINES = 80, 24


class Display:
    """Frames on the terminal behind a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def size(self) -> tuple[int, int]:
        """Columns and lines at this moment."""
        try:
            size = os.get_terminal_size(self._descriptor)
        except OSError:
            return _COLUMNS, _LINES
        return size.columns or _COLUMNS, size.lines or _LINES

    def show(self, lines: Sequence[str]) -> None:
        """Replace what is on the screen. Raises OSError if there is no terminal any more."""
        body = f"{_REST_OF_LINE}\n".join(lines)
        self._put(f"{_HOME}{body}{_REST_OF_LINE}{_REST_OF_SCREEN}")

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The second screen for the block; the first one is as it was afterwards."""
        self._put(_ENTER)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self._put(_LEAVE)

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(self._descriptor, data) :]


@contextlib.contextmanager
def resized(call: Callable[[], object]) -> Iterator[None]:
    """Call whenever the terminal's size changes."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, call)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


@contextlib.contextmanager
def quit_key(call: Callable[[], object]) -> Iterator[None]:
    """Call when q is pressed, or the terminal is gone; keys are not shown meanwhile."""
    descriptor = sys.stdin.fileno()
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        try:
            keys = os.read(descriptor, 64)
        except OSError:
            keys = b""
        if not keys or b"q" in keys.lower():
            loop.remove_reader(descriptor)
            call()

    # Ctrl-C still interrupts.
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, pressed)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
