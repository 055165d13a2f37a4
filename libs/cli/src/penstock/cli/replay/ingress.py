"""A simulated ingress: its account of in-flight work is the real one, its clock is virtual."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from penstock.cli.replay.timeline import Timeline
from penstock.common.messages import LoadReport, Placement
from penstock.common.model import InstanceId
from penstock.ingress.in_flight import InFlightAccount, Work
from penstock.ingress.speeds import Speeds
from penstock.sim.spec import TokenEvent

# As the service has them.
REPORT_EVERY_S, SNAPSHOT_EVERY_S = 0.025, 1.0
INCARNATION = "1"

Publish = Callable[[LoadReport, float], None]


class _Stream:
    """One request under way."""

    __slots__ = ("first_token_s", "prompt_tokens", "sent_s", "uncached_tokens", "work")

    def __init__(self, work: Work, sent_s: float, prompt_tokens: int, uncached_tokens: int) -> None:
        self.work, self.sent_s, self.first_token_s = work, sent_s, -1.0
        self.prompt_tokens, self.uncached_tokens = prompt_tokens, uncached_tokens


class SimIngress:
    """Counts what it sends and reports as the service does: changes every 25 ms, everything each second."""

    def __init__(self, name: str, timeline: Timeline, publish: Publish, phase_s: float) -> None:
        """`phase_s` is when its first report goes out."""
        self.name = name
        self._timeline, self._publish, self._phase_s = timeline, publish, phase_s
        self._account, self._speeds = InFlightAccount(name, INCARNATION), Speeds()
        self._streams: dict[str, _Stream] = {}
        self._reporting = False
        timeline.every(SNAPSHOT_EVERY_S, self._snapshot, phase_s)

    def sent(self, request_id: str, placement: Placement, prompt_tokens: int, now: float) -> None:
        """A request goes to the instance it was placed on."""
        work = self._account.start(placement.decision_id, placement.instance, prompt_tokens)
        uncached = prompt_tokens - placement.matched_tokens
        self._streams[request_id] = _Stream(work, now, prompt_tokens, uncached)
        self._changed(now)

    def forwarded(self, request_id: str, now: float) -> None:
        """What was counted as sent before goes out only now."""
        self._streams[request_id].sent_s = now

    def take(self, event: TokenEvent, instance: InstanceId, now: float) -> None:
        """A token came back."""
        stream = self._streams[event.request_id]
        stream.work.output_tokens = max(1, event.generated)
        if stream.first_token_s < 0:
            stream.first_token_s = now
            self._speeds.first_token(instance, stream.sent_s, now, stream.uncached_tokens)
        if event.finished:
            del self._streams[event.request_id]
            self._account.finish(stream.work.decision_id)
            tokens = stream.prompt_tokens, event.generated
            self._speeds.answered(instance, *tokens, stream.first_token_s, now)
            self._changed(now)

    def _changed(self, now: float) -> None:
        """Reports without changes say nothing, so only the next tick after a change is entered."""
        if not self._reporting:
            self._reporting = True
            ticks = (now - self._phase_s) // REPORT_EVERY_S + 1
            self._timeline.at(self._phase_s + ticks * REPORT_EVERY_S, self._report)

    def _report(self, now: float) -> None:
        self._reporting = False
        self._send(self._account.changes(), now)

    def _snapshot(self, now: float) -> None:
        reports = list(self._account.snapshot())
        for speeds in self._speeds.report():
            reports[-1] = msgspec.structs.replace(reports[-1], speeds=speeds)
        self._send(reports, now)

    def _send(self, reports: Iterable[LoadReport], now: float) -> None:
        for report in reports:
            self._publish(report, now)
