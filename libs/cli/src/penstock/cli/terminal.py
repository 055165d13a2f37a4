"""Text for terminals: colours where they are wanted, and nothing from outside that could steer one."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable
from typing import TextIO

RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, GREY = "31", "32", "33", "34", "35", "36", "90"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` on one line, control characters shown as `\\xNN`: log lines and events carry others' words."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def paint(text: str, colour: str) -> str:
    """`text` in a colour; "" leaves it as it is."""
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def when_nobody_reads(descriptor: int, call: Callable[[], object]) -> None:
    """Call once the reader of the pipe `descriptor` left, as `head` does; no wait for the next line."""
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(descriptor)
            call()

        # A pipe's writing end becomes "readable" when its other end is closed, and only then.
        loop.add_reader(descriptor, gone)


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user did not refuse colours (NO_COLOR)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
