"""Mask: a set of slots that blocks of the prefix index share."""

from __future__ import annotations

import msgspec


class Mask(msgspec.Struct, gc=False):
    """A set of slots as bits, shared by all blocks that are held by exactly these.

    Without `gc` the dicts of blocks stay out of the garbage collector's sight; visiting a million
    entries would stop the loop for 10 ms."""

    slots: int
