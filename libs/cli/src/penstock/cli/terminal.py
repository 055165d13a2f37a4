"""Text for terminals: colours where they are wanted, and nothing from outside that could steer one."""

from __future__ import annotations

import os
import re
from typing import TextIO

RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, GREY = "31", "32", "33", "34", "35", "36", "90"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` on one line, control characters shown as `\\xNN`: log lines and events carry others' words."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def paint(text: str, colour: str) -> str:
    """`text` in a colour; "" leaves it as it is."""
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose user did not refuse colours (NO_COLOR)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
