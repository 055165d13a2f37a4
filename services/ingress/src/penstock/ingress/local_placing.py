"""Placing without a scheduler (DESIGN D5): by this ingress's own table and account, and told in the log."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Final

from penstock.common.cells import Cell
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable
from penstock.common.messages import Mode, Placement, Reason, Rejection, ScheduleRequest
from penstock.common.model import Instance, Role
from penstock.common.routing_events import PLACEMENT, REJECTION, PlacementEvent, RejectionEvent
from penstock.ingress.in_flight import InFlightAccount, of_prefill_id
from penstock.ingress.local_pairs import LOCAL, able_alone, place_pair_locally
from penstock.ingress.local_policy import place_locally
from penstock.ingress.local_profiles import HASH_BYTES, LocalProfiles

if TYPE_CHECKING:
    from penstock.ingress.askers import Asker

# An enum's member costs 0.1 us where it is read from its class.
_NEUTRAL: Final = Mode.NEUTRAL


class LocalPlacer:
    """Finds instances for those whom no scheduler answers."""

    def __init__(
        self,
        table: InstanceTable,
        account: InFlightAccount,
        events: EventWriter,
        identity: Identity,
        placed: Cell,
        max_requests: int,
    ) -> None:
        """`placed` counts; `max_requests` as of `Placer`."""
        self._table, self._account, self._events = table, account, events
        self._name, self._placed, self._max_requests = identity.id, placed, max_requests
        self.profiles = LocalProfiles(max_requests)
        # By model and owner, in one version of the table.
        self._usual: dict[tuple[str, str], tuple[Sequence[Instance], bool]] = {}
        self._version = -1

    def place(self, asker: Asker) -> None:
        """Find an instance for one that still wants it, or say that there is none."""
        request = asker.request
        if not asker.waiting:
            self.release(request)
            return
        pool = self._table.serving(request.model)
        usable, bounded = self._usable(pool, request)
        kept_by, most = request.session.encode() or request.block_hashes[:HASH_BYTES], self._max_requests
        if request.strategy or self.profiles.active:
            kept_by, most = self.profiles.of(request)
        open_ = usable
        if bounded or most:
            open_ = [i for i in usable if self._account.on(i.id) < (i.max_requests or most or inf)]
        placement = self._find(open_, request, kept_by)
        instance = self._table.get(placement.instance) if placement is not None else None
        if placement is None and len(open_) < len(usable) and self._find(usable, request, kept_by):
            # Not released: it keeps its decision while it waits; what nobody confirms ends by itself.
            asker.rejected(self._tell(request, saturated(request)))
        elif placement is None or instance is None:
            # A scheduler may have reserved something in an answer that came too late, or was of no use.
            self.release(request)
            asker.rejected(self._tell(request, no_candidate(request, bool(pool))))
        else:
            self._placed.value += 1
            self._events.emit(PLACEMENT, request.model, request.request_id, self._event(request, placement))
            asker.placed(placement, instance)

    def _usable(self, pool: Sequence[Instance], request: ScheduleRequest) -> tuple[Sequence[Instance], bool]:
        """The instances that may take a request, and whether any of them takes so many at a time only. Of
        most requests they are those of the one before, until the fleet changes."""
        usual = request.mode is _NEUTRAL and not request.excluded
        if self._table.version != self._version:
            self._usual.clear()
            self._version = self._table.version
        key = request.model, request.owner
        known = self._usual.get(key) if usual else None
        if known is None:
            usable = [i for i in pool if eligible(i, request) and i.id not in request.excluded]
            if request.mode is _NEUTRAL:
                usable = able_alone(usable)
            known = usable, self._max_requests > 0 or any(i.max_requests for i in usable)
            if usual:
                self._usual[key] = known
        return known

    def _find(self, usable: Sequence[Instance], request: ScheduleRequest, kept_by: bytes) -> Placement | None:
        if request.mode is not _NEUTRAL:
            return place_pair_locally(usable, self._account.on, kept_by, request)
        instance = place_locally(usable, self._account.on, kept_by, request.decision_id)
        return None if instance is None else Placement(request.decision_id, instance.id, policy=LOCAL)

    def release(self, request: ScheduleRequest) -> None:
        """Give back what a scheduler may have reserved and nobody uses."""
        self._account.finish(request.decision_id)
        if request.mode is Mode.PD_BATCH:
            self._account.finish(of_prefill_id(request.decision_id))

    def _event(self, request: ScheduleRequest, placement: Placement) -> PlacementEvent:
        # In the order of its fields: by name they cost 0.3 us more.
        return PlacementEvent(
            request.decision_id,
            request.request_id,
            request.model,
            placement.instance,
            LOCAL,
            self._name,
            self._name,
            placement.prefill_instance,
            request.prompt_tokens,
            blocks=len(request.block_hashes) // HASH_BYTES,
        )

    def _tell(self, request: ScheduleRequest, rejection: Rejection) -> Rejection:
        event = RejectionEvent(
            decision_id=request.decision_id,
            request_id=request.request_id,
            model=request.model,
            reason=rejection.reason,
            replica=self._name,
            ingress=self._name,
            message=rejection.message,
        )
        self._events.emit(REJECTION, request.model, request.request_id, event)
        return rejection


def eligible(instance: Instance, request: ScheduleRequest) -> bool:
    """Whether this ingress may send such a request there by itself, or prefill's part of it."""
    owned = not request.owner or request.owner == instance.owned_by(request.model)
    fits = request.mode is not Mode.NEUTRAL or instance.role is not Role.PREFILL
    return owned and instance.takes_work and fits


def saturated(request: ScheduleRequest) -> Rejection:
    """The rejection of a request for which every instance has as much as it may have of this ingress."""
    text = f"every instance of model '{request.model}' that can take it is at its limit"
    return Rejection(request.decision_id, Reason.SATURATED, text, 1.0)


def no_candidate(request: ScheduleRequest, known: bool) -> Rejection:
    """The rejection of a request that no instance can take."""
    if known:
        text = f"no instance that serves '{request.model}' takes requests at the moment"
        return Rejection(request.decision_id, Reason.NO_INSTANCE, text, 1.0)
    return Rejection(request.decision_id, Reason.UNKNOWN_MODEL, f"the model '{request.model}' does not exist")
