"""The worker's side of the helper process that reads large bodies: started at the first one, fed one body
at a time, ended when none came for a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec

from penstock.common.telemetry import Metrics
from penstock.ingress.failures import GatewayError
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, Facts, FairQueue, Refusal, Setup, Task
from penstock.ingress.ports import BodyListener

log = logging.getLogger(__name__)

# Bodies that may wait. At 30 ms for the worst 4 MiB they are two seconds of work.
MAX_WAITING = 64
MAX_WAIT_S, MAX_TOKENS_WAIT_S = 10.0, 0.1
# A body that ends two helpers is not given to a third.
MAX_ATTEMPTS = 2
# The worst body takes 7 ms a MiB on a core of its own; a helper that is a hundred times slower hangs.
HANG_S, HANG_S_PER_MIB = 2.0, 0.75
# Its start takes a tenth of a second of a core, of which there may be little.
START_S = 5.0
RESTART_FIRST_S, RESTART_MOST_S = 0.1, 5.0
# An idle helper holds 15 MB, and starting one takes a tenth of a second.
IDLE_S = 60.0
REAP_S = 5.0
SIZE_BYTES = 4
MAX_ANSWER_BYTES = 64 * 1024
ARGV = (sys.executable, "-m", "penstock.ingress.body_reader")

_decode: Callable[[bytes], Facts | Refusal] = msgspec.msgpack.Decoder(Facts | Refusal).decode

Degraded = Callable[[str, bool, str], None]


class HelperLost(Exception):
    """The helper died, hangs, could not be started, or answered nonsense."""


class Entry:
    """A body that waits to be read."""

    __slots__ = ("body", "client", "listener", "overdue", "task")

    def __init__(self, listener: BodyListener, client: str, task: Task, body: bytes | bytearray) -> None:
        self.listener, self.client, self.task, self.body = listener, client, task, body
        self.overdue: asyncio.TimerHandle | None = None

    @property
    def most_wait_s(self) -> float:
        """How long it may wait for its turn; one that is read for its tokens alone can do without."""
        return MAX_WAIT_S if self.task.size > LARGE_BODY_BYTES else MAX_TOKENS_WAIT_S


class Helper:
    """One helper process and the pair of sockets to it."""

    def __init__(self, argv: Sequence[str] = ARGV) -> None:
        """Raises OSError."""
        self._ours, theirs = socket.socketpair()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            # Unlike the loop's own way of starting processes this one does not copy the page tables.
            self.process = subprocess.Popen(argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        except OSError:
            self._ours.close()
            raise
        finally:
            theirs.close()

    async def open(self, setup: Setup) -> None:
        """Attach to the running loop."""
        self._ours.setblocking(False)
        self._streams = await asyncio.open_connection(sock=self._ours)
        self._streams[1].write(_frame(setup))

    async def read(self, task: Task, body: bytes | bytearray) -> Facts | Refusal:
        """Raises OSError, EOFError or MsgspecError if the helper is of no use any more."""
        if self._streams is None:
            raise OSError("the helper is not open")
        reader, writer = self._streams
        writer.write(_frame(task))
        # The pair takes 200 KB at a time, so 4 MiB hold the loop for less than a millisecond.
        writer.write(body)
        await writer.drain()
        size = int.from_bytes(await reader.readexactly(SIZE_BYTES), "big")
        # A body that is not passed on as it came comes back with the answer.
        if size > MAX_ANSWER_BYTES + task.size:
            raise OSError(f"an answer of {size} bytes")
        return _decode(await reader.readexactly(size))

    def kill(self) -> None:
        """End it, frozen or not."""
        self.process.kill()
        if self._streams is not None:
            self._streams[1].transport.abort()
        else:
            self._ours.close()

    async def reaped(self) -> None:
        """Wait for its end, for a bounded time: a process in the hands of the kernel may not end at once."""
        try:
            await asyncio.to_thread(self.process.wait, REAP_S)
        except subprocess.TimeoutExpired:
            log.warning("helper %d does not end", self.process.pid)


class BodyHelper:
    """Reads large bodies for the exchanges of one worker; see `penstock.ingress.ports.LargeBodies`."""

    def __init__(
        self,
        setup: Setup,
        metrics: Metrics,
        degraded: Degraded,
        *,
        idle_s: float = IDLE_S,
        keep: bool = False,
        argv: Sequence[str] = ARGV,
    ) -> None:
        """`degraded` is told when bodies cannot be read, and when they can again. With `keep`, as a helper
        that loads a vocabulary needs it, the first one is started at once, and it stays while idle."""
        self._setup, self._say_degraded, self._idle_s, self._argv = setup, degraded, idle_s, argv
        self._keep = keep
        self._queue: FairQueue[Entry] = FairQueue(MAX_WAITING)
        self._wake = asyncio.Event()
        self._helper: Helper | None = None
        self._degraded = False
        self._pause_s = RESTART_FIRST_S
        self._bodies = metrics.counter(
            "penstock_ingress_large_bodies_total",
            "Bodies over 256 KiB by what became of their reading",
            "result",
        )
        self._lost = metrics.counter(
            "penstock_ingress_body_helpers_lost_total", "Helper processes that died, hung or did not start"
        )
        metrics.gauge(
            "penstock_ingress_large_bodies_waiting", "Bodies over 256 KiB that wait", lambda: len(self._queue)
        )

    @property
    def pid(self) -> int | None:
        """The helper's process id, None while there is none."""
        return self._helper.process.pid if self._helper is not None else None

    def read(
        self,
        listener: BodyListener,
        client: str,
        path: bytes,
        content_type: str,
        body: bytes | bytearray,
        *,
        divide: bool = False,
    ) -> None:
        """See `penstock.ingress.ports.LargeBodies`."""
        entry = Entry(listener, client, Task(path, content_type, len(body), divide), body)
        dropped = self._queue.push(client, entry)
        if dropped is not entry:
            loop = asyncio.get_running_loop()
            entry.overdue = loop.call_later(entry.most_wait_s, self._overdue, entry)
        if dropped is not None:
            self._refuse(dropped, f"{MAX_WAITING} large bodies wait to be read already")
        self._wake.set()

    def forget(self, listener: BodyListener) -> None:
        """See `penstock.ingress.ports.LargeBodies`."""
        entry = next((entry for entry in self._queue if entry.listener is listener), None)
        if entry is not None:
            self._queue.remove(entry.client, entry)
            self._settle(entry, "client_gone")

    async def run(self) -> None:
        """An eternal loop: one body after the other."""
        try:
            if self._keep:
                with contextlib.suppress(OSError):
                    await self._start()
            while True:
                entry = self._queue.pop()
                if entry is not None:
                    await self._serve(entry)
                    continue
                self._wake.clear()
                await self._more()
        finally:
            if self._helper is not None:
                self._helper.kill()
                # At the end of the service nobody is left to be held up.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._helper.process.wait(REAP_S)
                self._helper = None

    async def _more(self) -> None:
        """Wait for a body; without one for long, the helper goes."""
        if self._helper is not None and not self._keep:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._idle_s):
                    await self._wake.wait()
                return
            await self._end_helper()
        await self._wake.wait()

    async def _serve(self, entry: Entry) -> None:
        if entry.overdue is not None:
            entry.overdue.cancel()
        for _ in range(MAX_ATTEMPTS):
            if not entry.listener.waiting:
                self._settle(entry, "client_gone")
                return
            try:
                answer = await self._answer(entry)
            except HelperLost as exc:
                await self._recover(str(exc))
                continue
            self._recovered()
            # In a turn of its own: what goes wrong there must not end this loop.
            asyncio.get_running_loop().call_soon(self._deliver, entry, answer)
            return
        self._refuse(entry, "the process that reads large bodies ended twice over this one")

    async def _answer(self, entry: Entry) -> Facts | Refusal:
        limit_s = HANG_S + HANG_S_PER_MIB * entry.task.size / 2**20
        if self._helper is None:
            limit_s += START_S
        try:
            async with asyncio.timeout(limit_s):
                helper = self._helper or await self._start()
                return await helper.read(entry.task, entry.body)
        except TimeoutError:
            raise HelperLost(f"no answer within {limit_s:.1f} s") from None
        except (OSError, EOFError, msgspec.MsgspecError) as exc:
            raise HelperLost(str(exc) or repr(exc)) from exc

    async def _start(self) -> Helper:
        """Raises OSError."""
        self._helper = helper = Helper(self._argv)
        await helper.open(self._setup)
        return helper

    def _deliver(self, entry: Entry, answer: Facts | Refusal) -> None:
        if not entry.listener.waiting:
            self._settle(entry, "client_gone")
        elif isinstance(answer, Refusal):
            self._settle(entry, "invalid")
            entry.listener.body_refused(answer.error())
        else:
            self._settle(entry, "read")
            entry.listener.start(answer)

    def _refuse(self, entry: Entry, text: str) -> None:
        self._settle(entry, "overloaded")
        if entry.listener.waiting:
            entry.listener.body_refused(GatewayError("overloaded", text, retry_after_s=1.0))

    def _overdue(self, entry: Entry) -> None:
        self._queue.remove(entry.client, entry)
        self._refuse(entry, f"the body could not be read within {entry.most_wait_s:g} s")

    def _settle(self, entry: Entry, result: str) -> None:
        if entry.overdue is not None:
            entry.overdue.cancel()
        entry.body = b""
        self._bodies.inc(result)

    async def _recover(self, cause: str) -> None:
        """A helper was lost: the next one after a pause that grows while they keep being lost."""
        self._lost.inc()
        log.warning("the helper that reads large bodies is lost", extra={"fields": {"cause": cause}})
        if not self._degraded:
            self._degraded = True
            self._say_degraded("reading large bodies", True, cause)
        await self._end_helper()
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, RESTART_MOST_S)

    def _recovered(self) -> None:
        self._pause_s = RESTART_FIRST_S
        if self._degraded:
            self._degraded = False
            log.warning("large bodies are read again")
            self._say_degraded("reading large bodies", False, "")

    async def _end_helper(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.kill()
            await helper.reaped()


def _frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(SIZE_BYTES, "big") + payload
