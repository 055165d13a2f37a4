"""The ingress's parent: holds the port, keeps the workers running, answers probes for all of them."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec

from penstock.common.lifecycle import Lifecycle
from penstock.common.settings import reveal
from penstock.common.telemetry import FamilySnapshot, Metrics, Sample, Snapshot, merge
from penstock.common.tracing import Spans
from penstock.ingress.adapters.admin_relay import AdminCall, AdminReply
from penstock.ingress.adapters.channel import Channel
from penstock.ingress.adapters.connection_limit import ROWS, SharedCounts, counts_bytes, counts_file
from penstock.ingress.adapters.parent_limits import CountCall, CountReply, ParentCounts
from penstock.ingress.adapters.shared_pools import SharedPools
from penstock.ingress.admin_messages import AdminRequest, AdminResponse
from penstock.ingress.certificate_keeping import CertificateKeeper
from penstock.ingress.certificates import Certificates
from penstock.ingress.settings import IngressSettings
from penstock.ingress.worker import FromWorker, Report, SpanBatch, Start

log = logging.getLogger(__name__)

ASK_EVERY_S = 0.5
ASK_DEADLINE_S = 1.0
RESTART_FIRST_S, RESTART_MOST_S = 0.1, 5.0
# A worker that ran this long is restarted without a growing pause.
STEADY_S = 10.0
# What a worker gets on top of its own drain before it is killed.
KILL_GRACE_S = 5.0


# Workers get what stands in them.
_TLS_FILES = ("tls_cert", "tls_key", "tls_client_ca")

AnswerAdmin = Callable[[AdminRequest], Awaitable[AdminResponse]]


class Worker:
    """One worker process and the last it said."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Channel | None = None
        self.report: Report | None = None
        self.asked = False
        self.ended = ""
        self.heard = asyncio.Event()


class Parent:
    """Starts, watches and sums up the workers of one ingress."""

    def __init__(
        self,
        settings: IngressSettings,
        ingress_id: str,
        port: int,
        lifecycle: Lifecycle,
        answer: AnswerAdmin,
    ) -> None:
        """`answer` is the admin API, for what comes to it through the public port."""
        self._settings, self._port, self._lifecycle, self._answer = settings, port, lifecycle, answer
        self.id = ingress_id
        self._workers = [Worker(index) for index in range(settings.workers)]
        self._counts_file = counts_file(settings.workers)
        self._counts = [
            SharedCounts(self._counts_file.fileno(), settings.workers, row=row) for row in range(ROWS)
        ]
        self._pools = SharedPools(
            self._counts_file.fileno(), counts_bytes(settings.workers), settings.workers, 0
        )
        self._past: Snapshot = []
        self._limits = ParentCounts(time.time)
        # For HTTPS; set before the loops run.
        self.certificates: CertificateKeeper | None = None
        self.metrics = Metrics()
        self.spans = Spans(self.metrics)
        self._restarts = self.metrics.counter(
            "penstock_ingress_worker_restarts_total", "Workers that ended early"
        )
        self.metrics.gauge(
            "penstock_ready",
            "1 while the service takes work",
            lambda: float(not lifecycle.missing()),
            over="min",
        )
        lifecycle.require("workers", self._missing)
        for worker in self._workers:
            lifecycle.add_loop(f"worker-{worker.index}", self._keep(worker))
            lifecycle.add_loop(f"ask-{worker.index}", self._keep_asking(worker))

    async def snapshot(self) -> Snapshot:
        """Metrics summed over the workers, those of ended ones included."""
        await asyncio.gather(*(self._ask(worker) for worker in self._workers))
        reports = [worker.report.snapshot for worker in self._workers if worker.report is not None]
        return merge([self.metrics.snapshot(), *reports, self._past])

    async def drain(self) -> None:
        """Tell every worker to drain, wait for them, kill what does not end."""
        running = [worker.process for worker in self._workers if worker.process is not None]
        for process in running:
            _signal(process, kill=False)
        try:
            async with asyncio.timeout(self._settings.drain_timeout + KILL_GRACE_S):
                await asyncio.gather(*(process.wait() for process in running))
        except TimeoutError:
            log.error("workers did not drain in time, killing them")
            for process in running:
                _signal(process, kill=True)

    def _missing(self) -> str:
        faults = []
        for worker in self._workers:
            if worker.report is None:
                faults.append(f"worker {worker.index} is starting")
            elif worker.report.missing:
                faults.append(f"worker {worker.index}: {'; '.join(worker.report.missing)}")
        return ", ".join(faults)

    async def _keep(self, worker: Worker) -> None:
        pause = RESTART_FIRST_S
        while not self._lifecycle.stopping.is_set():
            started = time.monotonic()
            process, channel = await self._start(worker)
            await self._listen(worker, channel)
            code = await process.wait()
            self._bury(worker)
            if self._lifecycle.stopping.is_set():
                break
            self._restarts.inc()
            worker.ended = f"worker {worker.index} had ended with exit code {code}"
            pause = (
                RESTART_FIRST_S if time.monotonic() - started > STEADY_S else min(pause * 2, RESTART_MOST_S)
            )
            log.error(
                "worker ended, restarting it", extra={"fields": {"worker": worker.index, "exit_code": code}}
            )
            await asyncio.sleep(pause)
        await asyncio.Event().wait()

    async def _start(self, worker: Worker) -> tuple[asyncio.subprocess.Process, Channel]:
        ours, theirs = socket.socketpair()
        counts = self._counts_file.fileno()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "penstock.common.machine_code",
                "penstock.ingress",
                "penstock.ingress.worker",
                str(theirs.fileno()),
                str(counts),
                pass_fds=(theirs.fileno(), counts),
                stdin=asyncio.subprocess.DEVNULL,
            )
        channel = Channel(ours)
        await channel.open()
        kept = self.certificates
        start = Start(
            reveal(self._settings) | dict.fromkeys(_TLS_FILES),
            f"{self.id}-{worker.index}",
            self._port,
            worker.index,
            worker.ended,
            kept.current if kept is not None else None,
        )
        try:
            await channel.send(start)
        except OSError as exc:
            log.error("worker %d could not be told its settings: %s", worker.index, exc)
        worker.process, worker.channel, worker.asked = process, channel, False
        return process, channel

    async def _listen(self, worker: Worker, channel: Channel) -> None:
        message: FromWorker | None
        async with asyncio.TaskGroup() as calls:
            while (message := await channel.receive(FromWorker)) is not None:
                if isinstance(message, AdminCall):
                    calls.create_task(self._relay(message, channel), name="admin-call")
                    continue
                if isinstance(message, SpanBatch):
                    for span in message.spans:
                        self.spans.put(span)
                    continue
                if isinstance(message, CountCall):
                    await _tell(channel, self._limits.answer(message))
                    continue
                worker.report = message
                worker.asked = False
                worker.heard.set()

    async def _relay(self, call: AdminCall, channel: Channel) -> None:
        """The worker bounds how many of these there are at a time."""
        response = await self._answer(call.request)
        await _tell(channel, AdminReply(call.number, response))

    async def use(self, found: Certificates) -> None:
        """Hand fresh certificates to the workers."""
        for worker in self._workers:
            if worker.channel is not None:
                await _tell(worker.channel, found)

    async def _keep_asking(self, worker: Worker) -> None:
        while True:
            await self._ask(worker)
            await asyncio.sleep(ASK_EVERY_S)

    async def _ask(self, worker: Worker) -> None:
        """Refresh what is known of a worker; one that does not answer in time keeps its last report."""
        if worker.channel is None:
            return
        worker.heard.clear()
        try:
            async with asyncio.timeout(ASK_DEADLINE_S):
                if not worker.asked:
                    worker.asked = True
                    await worker.channel.send("?")
                await worker.heard.wait()
        except (TimeoutError, OSError) as exc:
            log.debug("worker %d does not answer: %r", worker.index, exc)

    def _bury(self, worker: Worker) -> None:
        if worker.channel is not None:
            worker.channel.close()
        if worker.report is not None:
            self._past = merge(
                [self._past, [_counted(f) for f in worker.report.snapshot if f.kind != "gauge"]]
            )
        for counts in self._counts:
            counts.clear(worker.index)
        self._pools.clear(worker.index)
        worker.channel = worker.report = worker.process = None


async def _tell(channel: Channel, reply: AdminReply | CountReply | Certificates) -> None:
    try:
        await channel.send(reply)
    except OSError as exc:
        log.debug("the worker is gone: %s", exc)


def _counted(family: FamilySnapshot) -> FamilySnapshot:
    samples = [Sample(s.labels, s.value, list(s.counts)) for s in family.samples]
    return msgspec.structs.replace(family, samples=samples)


def _signal(process: asyncio.subprocess.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except ProcessLookupError:
        log.debug("worker %d has already ended", process.pid)
