"""One divided request: prefill on one instance, decode on another, in the order that its protocol declares.

The exchange stays the one object of the request; this decides which instance it attempts next, and leaves
decode's answer to the exchange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from penstock.common.messages import Placement, ScheduleRequest, Stage
from penstock.common.model import Instance
from penstock.ingress.attempt import Attempt, Failure
from penstock.ingress.decoding import Decoding
from penstock.ingress.disaggregation.bodies import Members
from penstock.ingress.disaggregation.protocol import Answer, Order, Pair, ProtocolError
from penstock.ingress.disaggregation.protocols import Method
from penstock.ingress.disaggregation.stages import decode_stage, first_stage
from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.in_flight import Work, of_prefill_id
from penstock.ingress.ports import ResponseListener
from penstock.ingress.prefilling import Prefilling

if TYPE_CHECKING:
    from penstock.ingress.dividing import Dividing
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.gateway import Gateway

# Decode requests that used their parameters up: after the second that fails there is no third.
MAX_PASSED = 2


class Divided:
    """The way of one request over pairs of instances, one pair at a time; hears what became of both parts
    (`PrefillOwner`, `DecodeOwner`)."""

    # Of the last pair, for the log; 0 where there is no such phase.
    prefill_ms = transfer_wait_ms = decode_ttft_ms = 0.0
    # Where the prompt was computed last.
    computed_by = ""
    _pair: Pair | None = None
    _prefilling: Prefilling | None = None
    _decoding: Decoding | None = None
    _answer = Answer()
    _agreed = _fetched = False
    _passed = 0
    _result = ""

    def __init__(
        self, gateway: Gateway, dividing: Dividing, exchange: Exchange, method: Method, parts: Members
    ) -> None:
        """`parts` are the client's body."""
        self._gateway, self._dividing, self._exchange = gateway, dividing, exchange
        self._method, self._parts = method, parts
        self._deadline = exchange.deadline
        # In the account, and no attempt's to release.
        self._unsent: list[Work] = []

    @property
    def prefill_instance(self) -> str:
        """Of the pair in hand; empty if there is none."""
        return self._pair.prefill.id if self._pair is not None else ""

    @property
    def spent(self) -> bool:
        """Whether decode has used up parameters as often as it may."""
        return self._passed >= MAX_PASSED

    @property
    def _order(self) -> Order:
        return self._method.protocol.order

    @property
    def _moved(self) -> bool:
        detours = self._exchange.detours
        return detours is not None and detours.moved

    # -- placement ---------------------------------------------------------------------------------

    def placed(self, placement: Placement, instance: Instance) -> bool:
        """Begin what was placed. False: it is not divided, `instance` gets all of it."""
        if self._exchange.request.stage is Stage.DECODE:
            self._account_decode(placement.decision_id, instance)
            self._send_decode(instance)
            return True
        prefill = self._gateway.table.get(placement.prefill_instance) if placement.prefill_instance else None
        if prefill is None:
            self.computed_by = ""
            return False
        self._begin(placement, prefill, None if self._method.staged else instance)
        return True

    def _begin(self, placement: Placement, prefill: Instance, decode: Instance | None) -> None:
        decision_id, exchange = placement.decision_id, self._exchange
        pair = self._pair = self._dividing.pair(prefill, decode, decision_id, exchange.request_id)
        self._result, self.computed_by = "abandoned", prefill.id
        self.prefill_ms = self.transfer_wait_ms = self.decode_ttft_ms = 0.0
        of_prefill = decision_id if decode is None else of_prefill_id(decision_id)
        work = self._gateway.account.start(
            of_prefill, prefill.id, exchange.request.prompt_tokens, placement.matched_tokens
        )
        if decode is not None:
            self._account_decode(decision_id, decode)
        if self._order is Order.DECODE_ONLY and not self._method.protocol.missing(prefill):
            self._unsent.append(work)
        else:
            self._prefill(pair, work)
        if decode is not None and self._pair is pair and self._order is not Order.PREFILL_FIRST:
            self._send_decode(decode)

    def _account_decode(self, decision_id: str, decode: Instance) -> None:
        # All of its prompt is computed elsewhere.
        tokens = self._exchange.request.prompt_tokens
        self._unsent.append(self._gateway.account.start(decision_id, decode.id, tokens, tokens))

    def first_stage(self, request: ScheduleRequest) -> ScheduleRequest:
        """The request for a fresh pair."""
        return first_stage(request, self._method) if request.stage is Stage.DECODE else request

    def _ask_decode(self, pair: Pair, *excluded: str) -> None:
        """Have decode placed, on the load of this moment."""
        self._release_unsent()
        exchange, left_s = self._exchange, self._lease_until - self._gateway.clock()
        request = self._gateway.another_attempt(exchange.request, (*exchange.request.excluded, *excluded))
        exchange.ask(decode_stage(request, pair.prefill, left_s))

    # -- prefill (`penstock.ingress.prefilling.PrefillOwner`) --------------------------------------

    def _prefill(self, pair: Pair, work: Work) -> None:
        exchange = self._exchange
        exchange.deadline = min(self._deadline, self._gateway.clock() + self._dividing.prefill_timeout_s)
        prefilling = self._prefilling = Prefilling(self._gateway, self._dividing, self, self._method, pair)
        prefilling.send(exchange.head, self._parts, work, retry=self._moved)
        if self._prefilling is prefilling and self._decoding is None:
            exchange.attempting(prefilling.attempt)

    def prefill_agreed(self) -> None:
        """Decode's answer counts from here on."""
        self._note_prefill()
        self._agreed = True
        if self._decoding is not None:
            self._decoding.agree()

    def prefill_done(self, answer: Answer) -> None:
        """Go to decode, or have one placed."""
        pair = self._pair
        assert pair is not None
        self._note_prefill()
        self._answer = answer
        if pair.decode is None:
            self._ask_decode(pair)
            return
        current = self._gateway.table.get(pair.decode.id)
        if current is None or not current.takes_work:
            self._ask_decode(pair, pair.decode.id)
        else:
            self._send_decode(pair.decode)

    def _note_prefill(self) -> None:
        prefilling, pair = self._prefilling, self._pair
        assert prefilling is not None
        assert pair is not None
        self._dividing.holds.begin(pair.transfer_id, pair.prefill.id, prefilling.answered_at)
        if self._decoding is not None:
            self._note_passed(pair)
        self._exchange.deadline = self._deadline
        self.prefill_ms = (prefilling.answered_at - prefilling.attempt.sent_at) * 1000

    @property
    def _lease_until(self) -> float:
        answered_at = self._prefilling.answered_at if self._prefilling is not None else 0.0
        return answered_at + self._dividing.lease_s

    def prefill_refused(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """Its answer is the client's, or there is another pair: decode's part ends in both cases."""
        self._result = "prefill_failed"
        self._exchange.deadline = self._deadline
        self._end_decode()
        self._exchange.attempting(attempt)
        return self._exchange.answered(attempt, head)

    def prefill_failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """Another pair, if there may be one."""
        self._result = "prefill_failed"
        self._forget()
        self._fail(attempt, failure, cause)

    # -- decode (`penstock.ingress.decoding.DecodeOwner`) ------------------------------------------

    def _send_decode(self, instance: Instance) -> None:
        pair, gateway, exchange = self._pair, self._gateway, self._exchange
        assert pair is not None
        if self._order is Order.PREFILL_FIRST:
            over = gateway.clock() >= self._lease_until
            if over or gateway.table.get(pair.prefill.id) is None:
                self._result = "lease_over"
                exchange.detour().restart(
                    f"instance {pair.prefill.id}: {'its lease is over' if over else 'it left'}"
                )
                return
        pair = self._pair = msgspec.structs.replace(pair, decode=instance)
        try:
            edit = self._method.protocol.decode(pair, self._answer)
        except ProtocolError as exc:
            assert self._prefilling is not None
            self.prefill_failed(self._prefilling.attempt, Failure.LOST, str(exc))
            return
        if edit.sets:
            self._note_passed(pair)
        else:
            self._dividing.holds.end(pair.transfer_id)
        work = next(work for work in self._unsent if work.instance == instance.id)
        self._unsent.remove(work)
        waits = self._order is Order.TOGETHER and not self._agreed
        decoding = self._decoding = Decoding(gateway, self, waits=waits)
        decoding.prepare(instance, exchange.head, pair.request_id, self._parts, edit, work, retry=self._moved)
        exchange.attempting(decoding.attempt)
        decoding.go()

    def _note_passed(self, pair: Pair) -> None:
        self._dividing.holds.passed(pair.transfer_id, stream=self._exchange.stream)

    def decode_answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """Its answer is the client's, or there is another pair."""
        self._exchange.deadline = self._deadline
        if head.status == 200:
            self._result = "answered"
        else:
            self._used_up()
            if self._prefilling is not None:
                self._prefilling.close()
        if self._order is Order.PREFILL_FIRST and self._prefilling is not None:
            wait_s = max(0.0, attempt.sent_at - self._prefilling.answered_at)
            self.transfer_wait_ms = wait_s * 1000
            self._dividing.transfer_wait.observe(wait_s)
        return self._exchange.answered(attempt, head)

    def decode_failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """Another pair, or another decode where it can have seen nothing of what prefill keeps. Who closes a
        connection that was used before may have read the request."""
        if failure in (Failure.LOST, Failure.STALE):
            self._used_up()
        elif failure is Failure.REFUSED and self._another_decode(attempt):
            return
        self._result = "decode_failed"
        self._fail(attempt, failure, cause)

    def _another_decode(self, attempt: Attempt) -> bool:
        pair = self._pair
        if self._order is not Order.PREFILL_FIRST or pair is None or not self._exchange.detour().free_move():
            return False
        attempt.close()
        self._gateway.breakers.failed(attempt.target, self._gateway.clock())
        self._ask_decode(pair, attempt.target)
        return True

    def _used_up(self) -> None:
        self._passed += 1
        self._result = "decode_failed"
        self._forget()

    def _forget(self) -> None:
        if self._pair is not None:
            self._dividing.forget(self._pair.prefill)

    def _fail(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        self._exchange.deadline = self._deadline
        self._exchange.attempting(attempt)
        self._exchange.failed(attempt, failure, cause)

    # -- the answer, and ends ----------------------------------------------------------------------

    def expired(self) -> bool:
        """A deadline passed: True if it was prefill's, and what is due was done."""
        if self._prefilling is None or not self._prefilling.pending:
            return False
        if self._exchange.deadline >= self._deadline:
            return False
        self._prefilling.late(self._dividing.prefill_timeout_s)
        return True

    def relayed(self) -> None:
        """An answer goes to the client: no other pair can be tried."""
        self._parts = {}

    def began(self, now: float) -> None:
        """The first piece of that answer."""
        if self._result != "answered" or self._decoding is None:
            return
        self._fetched = True
        if self._pair is not None:
            self._dividing.holds.end(self._pair.transfer_id)
        ttft_s = now - self._decoding.attempt.sent_at
        self.decode_ttft_ms = ttft_s * 1000
        self._dividing.decode_ttft.observe(ttft_s)
        # Where prefill had no request of its own, its share ends here.
        self._release_unsent()

    def close(self) -> None:
        """Let go of the pair, and tell prefill if nobody will fetch. More than once is once."""
        pair, prefilling = self._pair, self._prefilling
        if pair is None:
            return
        self._dividing.count(self._method, self._result)
        self._dividing.holds.end(pair.transfer_id)
        if prefilling is not None:
            prefilling.close()
            if prefilling.may_hold and not self._fetched:
                self._dividing.cancel(pair, self._method)
        self._end_decode()
        self._release_unsent()
        self._pair = self._prefilling = None
        self._answer, self._agreed = Answer(), False

    def _end_decode(self) -> None:
        if self._decoding is not None:
            self._decoding.close()
        self._decoding = None

    def _release_unsent(self) -> None:
        unsent, self._unsent = self._unsent, []
        for work in unsent:
            self._gateway.account.finish(work.decision_id)
