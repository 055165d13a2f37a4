"""The ingress's account of its own in-flight work: the only truth about it (DESIGN 3.4).

What changed since the last report is remembered, so that a report costs what changed; a snapshot
says everything. An entry leaves through `finish` and through nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from penstock.common.messages import InFlight, InstanceSpeed, LoadReport
from penstock.common.model import InstanceId

# Finished ids waiting for a report; past it the next report is a snapshot, which needs none of them.
MAX_FINISHED: Final = 65_536
# Entries of one report: with instance ids of 512 bytes still under the bound of the LOAD subject.
PIECE_ENTRIES: Final = 512


def of_prefill_id(decision_id: str) -> str:
    """Under which prefill's share of a pair that was placed together is accounted; decode's is under the
    decision's own id."""
    return f"{decision_id}+p"


class Work:
    """One decision's work; `output_tokens` grows while its stream runs, `cached_tokens` of its prompt need
    not be computed."""

    __slots__ = ("cached_tokens", "decision_id", "instance", "output_tokens", "prompt_tokens")

    def __init__(
        self, decision_id: str, instance: InstanceId, prompt_tokens: int, cached_tokens: int = 0
    ) -> None:
        self.decision_id, self.instance, self.prompt_tokens = decision_id, instance, prompt_tokens
        self.cached_tokens = cached_tokens
        self.output_tokens = 0


class InFlightAccount:
    """In-flight work by decision id, its sum by instance, and what the schedulers have not heard of."""

    def __init__(self, ingress: str, incarnation: str) -> None:
        self._ingress, self._incarnation = ingress, incarnation
        self._work: dict[str, Work] = {}
        self._per_instance: dict[InstanceId, int] = {}
        self._started: list[str] = []
        self._finished: list[str] = []
        self._sequence = 0
        self.snapshot_due = True
        # Who waits for a slot hears of each that is free; nobody does while nobody waits.
        self.on_free: Callable[[InstanceId], None] | None = None

    def __len__(self) -> int:
        return len(self._work)

    def on(self, instance: InstanceId) -> int:
        """Requests in flight on an instance."""
        return self._per_instance.get(instance, 0)

    def by_instance(self) -> Iterator[tuple[InstanceId, int]]:
        """(instance, requests), those with any."""
        return iter(self._per_instance.items())

    def start(
        self, decision_id: str, instance: InstanceId, prompt_tokens: int, cached_tokens: int = 0
    ) -> Work:
        """Count a request that goes to `instance`; an id that is counted already moves there."""
        if decision_id in self._work:
            self._remove(decision_id)
        work = self._work[decision_id] = Work(decision_id, instance, prompt_tokens, cached_tokens)
        self._per_instance[instance] = self._per_instance.get(instance, 0) + 1
        self._started.append(decision_id)
        return work

    def began(self, work: Work) -> None:
        """Its first token came: schedulers hear with the next report that its prompt is computed."""
        work.output_tokens = 1
        self._started.append(work.decision_id)

    def finish(self, decision_id: str) -> None:
        """Release a decision; one that was never counted here is released at the schedulers too."""
        work = self._remove(decision_id)
        if len(self._finished) >= MAX_FINISHED:
            self._finished.clear()
            self.snapshot_due = True
        self._finished.append(decision_id)
        if work is not None and self.on_free is not None:
            self.on_free(work.instance)

    def _remove(self, decision_id: str) -> Work | None:
        work = self._work.pop(decision_id, None)
        if work is None:
            return None
        left = self._per_instance[work.instance] - 1
        if left:
            self._per_instance[work.instance] = left
        else:
            del self._per_instance[work.instance]
        return work

    def changes(self) -> Iterator[LoadReport]:
        """Reports of what changed since the last; none if nothing did."""
        started = [self._work[d] for d in self._started if d in self._work]
        finished, self._started, self._finished = self._finished, [], []
        while started or finished:
            yield self._report(
                _entries(started[:PIECE_ENTRIES]),
                tuple(finished[:PIECE_ENTRIES]),
                piece=0,
                pieces=0,
            )
            started, finished = started[PIECE_ENTRIES:], finished[PIECE_ENTRIES:]

    def speeds(self, sums: Iterable[tuple[InstanceSpeed, ...]]) -> Iterator[LoadReport]:
        """Reports of how fast instances serve; `sums` holds as many at a time as a report may."""
        for some in sums:
            yield self._report((), (), piece=0, pieces=0, speeds=some)

    def snapshot(self, leaving: bool = False) -> Iterator[LoadReport]:
        """Everything, in as many pieces as its size needs; at least one."""
        self.snapshot_due = False
        yield from self.changes()
        work = list(self._work.values())
        pieces = max(1, -(-len(work) // PIECE_ENTRIES))
        for piece in range(pieces):
            entries = work[piece * PIECE_ENTRIES : (piece + 1) * PIECE_ENTRIES]
            yield self._report(_entries(entries), (), piece=piece, pieces=pieces, leaving=leaving)

    def _report(
        self,
        entries: tuple[InFlight, ...],
        finished: tuple[str, ...],
        *,
        piece: int,
        pieces: int,
        leaving: bool = False,
        speeds: tuple[InstanceSpeed, ...] = (),
    ) -> LoadReport:
        self._sequence += 1
        return LoadReport(
            self._ingress,
            self._incarnation,
            self._sequence,
            entries,
            finished,
            piece,
            pieces,
            leaving,
            speeds,
        )


def _entries(work: list[Work]) -> tuple[InFlight, ...]:
    return tuple(
        InFlight(w.decision_id, w.instance, w.prompt_tokens, w.output_tokens, w.cached_tokens) for w in work
    )
