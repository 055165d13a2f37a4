"""Real servers and processes for tests, and the one bounded wait that tests use.

This is the only file of the tests that waits by the clock. Starting, stopping and the waits of
`Process` block; an async test whose own loop must go on meanwhile calls them with `asyncio.to_thread`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import inspect
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self, TypeVar, overload
from urllib.parse import urlsplit

T = TypeVar("T")

POLL_S = 0.02
# What is waited for comes in far less; so long only where nearly no processor is left to the tests.
PATIENCE_S = 60.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


# The ports of one process of pytest-xdist: none is another's, or given twice while its server starts.
_FIRST_PORT, _PORTS_EACH = 20_000, 1_596
# Nodes of a Redis cluster talk on a port higher by this, which has to be free and nobody else's, too.
CLUSTER_BUS_OFFSET = 10_000
_FIRST_CLUSTER_PORT, _CLUSTER_PORTS_EACH = 9_000, 125
_place = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_turn = itertools.count(random.randrange(_PORTS_EACH))


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment.

    It lies below the range that the kernel takes ports of outgoing connections from: a client that
    keeps trying to reach a stopped server could else be given the server's own port.

    Raises:
        AssertionError: every port of this process is taken.
    """
    return _next_free(_FIRST_PORT, _PORTS_EACH)


def free_cluster_port() -> int:
    """A `free_port` whose port of a Redis cluster's bus is free, too.

    Raises:
        AssertionError: every such port of this process is taken.
    """
    return _next_free(_FIRST_CLUSTER_PORT, _CLUSTER_PORTS_EACH, CLUSTER_BUS_OFFSET)


def _next_free(first: int, each: int, *offsets: int) -> int:
    for _ in range(each):
        port = first + _place * each + next(_turn) % each
        if all(_is_free(port + offset) for offset in (0, *offsets)):
            return port
    raise AssertionError(f"no port of {first + _place * each}..{first + (_place + 1) * each - 1} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@overload
async def eventually(check: Callable[[], Awaitable[T | None]], timeout_s: float = PATIENCE_S) -> T: ...
@overload
async def eventually(check: Callable[[], T | None], timeout_s: float = PATIENCE_S) -> T: ...
async def eventually(check: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """The first truthy value of `check`, which may be async. One that raises AssertionError is asked again.

    Raises:
        AssertionError: the last one of `check`, or with its last value, once `timeout_s` is over.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            outcome = check()
            value = await outcome if inspect.isawaitable(outcome) else outcome
            if value:
                return value
            last = value
        except AssertionError as exc:
            last = exc
        if time.monotonic() >= deadline:
            raise _never(last, timeout_s)
        await asyncio.sleep(POLL_S)


def eventually_sync(check: Callable[[], T | None], timeout_s: float = PATIENCE_S) -> T:
    """`eventually` without a loop."""
    deadline = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            value = check()
            if value:
                return value
            last = value
        except AssertionError as exc:
            last = exc
        if time.monotonic() >= deadline:
            raise _never(last, timeout_s)
        time.sleep(POLL_S)


def _never(last: object, timeout_s: float) -> AssertionError:
    if isinstance(last, AssertionError):
        return last
    return AssertionError(f"not within {timeout_s} s; the last value was {last!r}")


def http_status(url: str, timeout_s: float = 1.0) -> int | None:
    """Status of a GET, None if nobody answers. No proxy is asked, whatever the environment says."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# A killed pytest runs no finalizer; Linux then kills what it started. The kernel's "parent" is the
# thread that forked, so that one thread, which lives as long as the tests, starts every process.
_spawner = ThreadPoolExecutor(1, thread_name_prefix="spawner")
_prctl = getattr(ctypes.CDLL(None), "prctl", None)
_PR_SET_PDEATHSIG = 1


def _end_with_the_tests() -> None:
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill, frozen or not, and reap."""
    if process.poll() is None:
        process.kill()
        process.wait()


class Process:
    """A process of the test; leaving the context, or losing the object, kills it."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, name: str = "") -> None:
        """`env` is added to the environment, without its `PENSTOCK_` variables."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
        self.name = name or Path(argv[0]).name
        self.lines: list[str] = []
        self.out: list[str] = []
        self._popen = _spawner.submit(
            subprocess.Popen,
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**inherited, "PYTHONUNBUFFERED": "1", **(env or {})},
            preexec_fn=_end_with_the_tests if _prctl else None,
        ).result()
        self._finalizer = weakref.finalize(self, _end, self._popen)
        self._readers = [
            threading.Thread(target=_collect, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self._popen.stderr, self.lines), (self._popen.stdout, self.out))
        ]
        for reader in self._readers:
            reader.start()

    @classmethod
    def module(cls, module: str, *args: str, env: Mapping[str, str] | None = None) -> Self:
        """`python -m module args` with the interpreter of the tests."""
        return cls([sys.executable, "-m", module, *args], env=env, name=module)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._popen.poll()

    @property
    def stderr(self) -> str:
        return "\n".join(self.lines)

    @property
    def stdout(self) -> str:
        return "\n".join(self.out)

    def find(self, pattern: str) -> re.Match[str] | None:
        """The first match in the lines of stderr so far, else of stdout; for `eventually`."""
        return next((m for line in [*self.lines, *self.out] if (m := re.search(pattern, line))), None)

    def wait_for_line(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """The first line that matches; AssertionError with all lines if it never comes."""
        return self.wait_until(lambda: self.find(pattern), f"a line like {pattern!r}", timeout_s)

    def wait_for_http(self, url: str, status: int = 200, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return once a GET of `url` gives `status`."""
        self.wait_until(lambda: http_status(url) == status, f"status {status} of {url}", timeout_s)

    def wait_until(self, check: Callable[[], T | None], what: str, timeout_s: float = START_TIMEOUT_S) -> T:
        """The first truthy value of `check`. AssertionError with all lines if it never comes, RuntimeError
        if the process ends first."""

        def alive_and() -> T | None:
            value = check()
            if not value and self.exit_code is not None:
                raise RuntimeError(f"{self.name} ended with {self.exit_code}\n{self.stderr}\n{self.stdout}")
            return value

        try:
            return eventually_sync(alive_and, timeout_s)
        except AssertionError as exc:
            raise AssertionError(f"{self.name}: no {what}\n{self.stderr}\n{self.stdout}") from exc

    def terminate(self) -> None:
        """SIGTERM."""
        self._popen.terminate()

    def interrupt(self) -> None:
        """SIGINT, as Ctrl-C sends it."""
        self._popen.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        _end(self._popen)

    def freeze(self) -> None:
        """SIGSTOP: it keeps its sockets and answers nothing."""
        self._popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._popen.send_signal(signal.SIGCONT)

    def heal(self) -> None:
        """SIGUSR1: simulated engines that refuse connections listen again."""
        self._popen.send_signal(signal.SIGUSR1)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code; AssertionError if it does not end."""
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise AssertionError(f"{self.name} still runs after {timeout_s} s\n{self.stderr}") from exc
        for reader in self._readers:
            reader.join(1)
        return code

    def assert_exit(self, code: int = 0, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait for the end and compare the exit code."""
        ended = self.wait(timeout_s)
        assert ended == code, f"{self.name} ended with {ended}, not {code}\n{self.stderr}\n{self.stdout}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finalizer()
        for reader in self._readers:
            reader.join(1)


def _collect(pipe: IO[bytes] | None, lines: list[str]) -> None:
    assert pipe is not None
    with pipe:
        for line in pipe:
            lines.append(line.decode("utf-8", "replace").rstrip("\n"))


class NatsServer:
    """A nats-server of its own on loopback, with JetStream in a temporary folder."""

    def __init__(self, *args: str, env: Mapping[str, str] | None = None) -> None:
        """`args` are added to the command line, `env` to the environment."""
        self._args, self._env = args, env
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-nats-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._process: Process | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def folder(self) -> Path:
        """Where its store is."""
        return self._folder

    @property
    def process(self) -> Process:
        assert self._process is not None, "the server is not started"
        return self._process

    def start(self) -> None:
        """Start, and return once it accepts connections."""
        binary = Path(sys.executable).parent / "nats-server"
        address = ["--addr", "127.0.0.1", "--port", str(self.port)]
        store = ["--jetstream", "--store_dir", str(self._folder)]
        argv = [str(binary), *address, *store, *self._args]
        self._process = Process(argv, env=self._env, name="nats-server")
        self._process.wait_until(self._greets, "greeting")

    def stop(self) -> None:
        """SIGTERM; it writes what it holds and leaves."""
        self.process.terminate()
        self.process.wait()
        self._close()

    def kill(self) -> None:
        """SIGKILL."""
        self._close()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self.process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.thaw()

    async def freeze_for(self, seconds: float) -> None:
        """A pause of a known length, while the loop of the test goes on."""
        self.freeze()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.thaw()

    def restart(self, *, keep_store: bool) -> None:
        """Kill it (if it still runs) and start it again on the same port, with its store or an empty one."""
        self._close()
        if not keep_store:
            self.wipe()
        self.start()

    def wipe(self) -> None:
        """Empty the store of a server that is down."""
        assert self._process is None, "the server still runs"
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def _close(self) -> None:
        if self._process is not None:
            self._process.__exit__()
            self._process = None

    def _greets(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe,
        ):
            return probe.recv(64).startswith(b"INFO ")
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()
        self._finalizer()
