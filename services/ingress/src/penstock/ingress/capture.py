"""Copies of requests for the mirror: sampled, sent and forgotten. No request waits for one or fails by it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from typing import NamedTuple

from penstock.common.bus import Bus
from penstock.common.errors import MessageTooLarge
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.messages import MirrorCopy, MirrorPrimary
from penstock.common.mirroring import MirrorConfig
from penstock.common.response_tail import finish_reason_in
from penstock.common.routing_events import MIRRORED, MirroredEvent, OutcomeEvent
from penstock.common.subjects import MIRROR, MIRROR_PRIMARY
from penstock.common.telemetry import Metrics
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.sampling import Sampler, target_without_credentials, without_credentials

log = logging.getLogger(__name__)

# What a copy holds beside body, header lines and target: ids, model, framing.
ENVELOPE_BYTES = 4096
# Copies that wait to be sent. They leave after what schedulers are asked in the meantime, and in portions:
# a large one in front of a schedule request would hold it up.
MAX_WAITING_BYTES = 4 * 1024 * 1024
MAX_WAITING = 4096
LINGER_S = 0.001
PORTION_BYTES = 256 * 1024


class _Waiting(NamedTuple):
    id: str
    request_id: str
    model: str
    head: RequestHead
    body: bytes | bytearray
    compared: bool
    size: int


class Capture:
    """One process's copies, by the configuration of the moment."""

    def __init__(
        self,
        bus: Bus,
        events: EventWriter,
        identity: Identity,
        metrics: Metrics,
        *,
        forward_credentials: bool,
    ) -> None:
        self._bus, self._events, self._identity = bus, events, identity
        self._forward_credentials = forward_credentials
        self._sampler = Sampler()
        self._numbers = itertools.count(1)
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self.config = MirrorConfig()
        self._copies = metrics.counter(
            "penstock_ingress_mirror_copies_total", "Copies for the mirror by what became of them", "result"
        )

    def copy(self, head: RequestHead, body: bytes | bytearray, model: str, request_id: str) -> Copied | None:
        """Copy a request if it is its turn; what is to hear how it ended, if that is to be compared.

        `body` must not change any more."""
        try:
            if not self._sampler.takes(self.config, model, head.block, head.read):
                return None
            return self._keep(head, body, model, request_id)
        except Exception:
            log.exception("copying a request for the mirror failed")
            self._copies.inc("fault")
            return None

    def _keep(self, head: RequestHead, body: bytes | bytearray, model: str, request_id: str) -> Copied | None:
        copy_id = f"{self._identity.incarnation}.{next(self._numbers):x}"
        size = len(body) + len(head.block) + len(head.origin_form) + ENVELOPE_BYTES
        one = _Waiting(copy_id, request_id, model, head, body, self.config.Compare, size)
        if size > MIRROR.max_bytes:
            self._drop(one, "oversize")
            return None
        if self._waiting_bytes + size > MAX_WAITING_BYTES or len(self._waiting) >= MAX_WAITING:
            self._drop(one, "too many at once")
            return None
        self._waiting.append(one)
        self._waiting_bytes += size
        self._wake.set()
        return Copied(self._bus, copy_id, self._identity.id) if one.compared else None

    async def run(self) -> None:
        """Send what waits: a loop of the service."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await asyncio.sleep(LINGER_S)
                self.send_portion()

    def send_portion(self) -> None:
        """Send the oldest that wait."""
        sent = 0
        while self._waiting and sent < PORTION_BYTES:
            one = self._waiting.popleft()
            self._waiting_bytes -= one.size
            sent += one.size
            try:
                trouble = self._send(one)
            except Exception:
                log.exception("sending a copy to the mirror failed")
                trouble = "fault"
            if trouble:
                self._drop(one, trouble)
            else:
                self._copies.inc("sent")

    def _send(self, one: _Waiting) -> str:
        block, target = one.head.block, one.head.origin_form
        if not self._forward_credentials:
            block, target = without_credentials(block), target_without_credentials(target)
        # A bytearray is encoded as bytes are.
        message = MirrorCopy(
            one.id,
            one.request_id,
            one.model,
            one.head.method,
            target,
            block,
            one.body,  # type: ignore[arg-type]
            one.compared,
        )
        try:
            return "" if self._bus.publish(MIRROR, message, one.model) else "bus"
        except MessageTooLarge:
            return "oversize"

    def _drop(self, one: _Waiting, reason: str) -> None:
        self._copies.inc(reason)
        event = MirroredEvent(
            one.id, one.request_id, one.model, "dropped", self._identity.writer, reason=reason
        )
        self._events.emit(MIRRORED, one.model, one.request_id, event)


class Copied:
    """A copied request whose end is to be compared with its shadow's."""

    __slots__ = ("_bus", "_id", "_ingress")

    def __init__(self, bus: Bus, copy_id: str, ingress: str) -> None:
        self._bus, self._id, self._ingress = bus, copy_id, ingress

    def ended(self, outcome: OutcomeEvent, tail: bytes) -> None:
        """Tell the mirrors; `tail` is the end of the response."""
        primary = MirrorPrimary(
            self._id,
            outcome.status,
            outcome.ttft_ms,
            outcome.e2e_ms,
            outcome.bytes_out,
            outcome.completion_tokens,
            finish_reason_in(tail),
        )
        self._bus.publish(MIRROR_PRIMARY, primary, self._ingress)
