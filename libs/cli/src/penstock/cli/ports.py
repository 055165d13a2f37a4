"""Ports of this machine: which are free, and who holds the others."""

from __future__ import annotations

import errno
import random
import socket

import psutil

# Below the range that Linux takes ports of outgoing connections from: neither such a connection nor a
# client that connects to itself can take a port while its server is being restarted.
LOWEST, HIGHEST = 20_000, 32_767
ATTEMPTS = 1000


class NoFreePort(Exception):
    """No port was free in `ATTEMPTS` attempts."""

    def __init__(self, host: str) -> None:
        super().__init__(f"no free port between {LOWEST} and {HIGHEST} on {host}")


def trouble(host: str, port: int) -> str:
    """Why a server cannot listen there, in words; "" if it can."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[4])
            listener.listen(1)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return f"in use by {holder(port)}"
        return f"cannot listen on {host}: {exc.strerror or exc}"
    return ""


def holder(port: int) -> str:
    """The program that listens on `port`, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        return "another program"
    return "another program"


class FreePorts:
    """Hands out free ports of one address, each once."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._given: set[int] = set()

    def take(self, preferred: int = 0) -> int:
        """`preferred` if it is free, else another one. Raises NoFreePort."""
        if preferred and self._take(preferred, 1):
            return preferred
        return self.take_row(1)

    def take_row(self, count: int) -> int:
        """The first of `count` free ports in a row. Raises NoFreePort."""
        for _ in range(ATTEMPTS):
            first = random.randint(LOWEST, HIGHEST - count + 1)
            if self._take(first, count):
                return first
        raise NoFreePort(self._host)

    def _take(self, first: int, count: int) -> bool:
        wanted = range(first, first + count)
        if not self._given.isdisjoint(wanted) or any(trouble(self._host, port) for port in wanted):
            return False
        self._given.update(wanted)
        return True
