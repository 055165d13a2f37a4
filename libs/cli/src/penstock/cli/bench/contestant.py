"""What takes part in the bench: the processes to start, and the ways that lead through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import psutil

from penstock.cli.bench.way import Way
from penstock.cli.processes import Child, Command


class Started:
    """The processes that run, by the names of their commands."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._pids = {child.command.name: child.pid for child in children}

    def pid(self, name: str) -> int:
        """Of the process that a command started."""
        return self._pids[name]

    def children(self, name: str) -> list[int]:
        """Of everything that this process started, and what that did."""
        return [process.pid for process in psutil.Process(self.pid(name)).children(recursive=True)]


class Contestant(Protocol):
    """Something that requests can go through."""

    commands: Sequence[Command]

    def ways(self, started: Started) -> list[Way]:
        """The ways through it. Asked again and again until all its processes run: psutil.Error if not."""
