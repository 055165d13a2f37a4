"""What was decided and not told yet: the answer leaves first, since somebody waits for it."""

from __future__ import annotations

from penstock.common.bus import Bus
from penstock.common.messages import Placed, Placement, Rejection, ScheduleBatch, ScheduleRequest
from penstock.common.routing_events import ViewAge
from penstock.common.subjects import DEFAULT_SHARD, PLACED
from penstock.scheduler.decisions import Decision
from penstock.scheduler.explaining import Explaining
from penstock.scheduler.instruments import Instruments
from penstock.scheduler.recording import Numbers
from penstock.scheduler.replica import Replica
from penstock.scheduler.telling import Teller


class Made:
    """What was decided of one message, in turn; `whole` once that is all of it. What became of one that broke
    off is not known."""

    def __init__(self, batch: ScheduleBatch, view: ViewAge) -> None:
        self.batch, self.view, self.whole = batch, view, False
        self.placed: list[Placed] = []
        # With what the decision was made on, seconds it took, when it was made.
        self.decided: list[tuple[ScheduleRequest, Decision, Numbers | None, float, float]] = []

    def outcomes(self, *, sorted_: bool) -> tuple[Placement | Rejection, ...]:
        """One for each request, in their order; `sorted_`: they were decided in another one."""
        if not sorted_:
            return tuple([decision.outcome for _, decision, _, _, _ in self.decided])
        by_id = {decision.outcome.decision_id: decision.outcome for _, decision, _, _, _ in self.decided}
        return tuple([by_id[request.decision_id] for request in self.batch.requests])


class Untold:
    """Tells siblings, the routing log, metrics and the memory of `explain` what was decided."""

    def __init__(
        self, bus: Bus, replica: Replica, explaining: Explaining, teller: Teller, instruments: Instruments
    ) -> None:
        self._bus, self._replica, self._explaining = bus, replica, explaining
        self._teller, self._instruments = teller, instruments
        self._made: list[Made] = []

    def begin(self, batch: ScheduleBatch, view: ViewAge) -> Made:
        """A message is decided, on a view of this age."""
        made = Made(batch, view)
        self._made.append(made)
        return made

    def tell(self) -> None:
        """Of all that was decided."""
        all_made, self._made = self._made, []
        for made in all_made:
            self._tell(made)

    def _tell(self, made: Made) -> None:
        batch, view = made.batch, made.view
        if made.whole:
            for feed in self._replica.feed(batch, made.placed):
                self._bus.publish(PLACED, feed, DEFAULT_SHARD)
        explaining, teller, instruments = self._explaining, self._teller, self._instruments
        for request, decision, numbers, took_s, ended in made.decided:
            inputs = None
            if numbers is not None and made.whole:
                inputs = explaining.keep(batch, request, decision, numbers, view, ended)
            teller.decision(batch, request, decision, view, inputs)
            instruments.decided(decision, took_s)
        explaining.end(batch, view)
