"""The ledger against lost, repeated, re-ordered and late messages, restarts and silence."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import count

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.common.messages import InFlight, LoadReport, Placed
from penstock.scheduler.ledger import SILENCE_S, InFlightLedger

INSTANCES = ("a", "b", "c")
WINDOW_S = 1.0


class Ingress:
    """The truth: what one ingress has in flight, and the reports it writes of it."""

    def __init__(self, name: str) -> None:
        self.name, self.incarnation = name, 0
        self.restart()

    def restart(self) -> None:
        self.incarnation += 1
        self.sequence = 0
        self.work: dict[str, InFlight] = {}
        self.started: set[str] = set()
        self.finished: list[str] = []

    def start(self, decision: str, instance: str) -> None:
        self.work[decision] = InFlight(decision, instance, 10)
        self.started.add(decision)

    def report(self, work: list[InFlight], **more: int | bool) -> LoadReport:
        self.sequence += 1
        finished, self.finished = tuple(self.finished), []
        head = self.name, str(self.incarnation), self.sequence
        return msgspec.structs.replace(LoadReport(*head, tuple(work), finished), **more)

    def changes(self) -> LoadReport:
        started, self.started = self.started, set()
        return self.report([self.work[d] for d in sorted(started) if d in self.work])

    def snapshot(self, pieces: int) -> list[LoadReport]:
        self.started = set()
        work = list(self.work.values())
        return [self.report(work[p::pieces], piece=p, pieces=pieces) for p in range(pieces)]


class LedgerMachine(RuleBasedStateMachine):
    """Ingresses and schedulers talk through a channel that loses, repeats and re-orders."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.now = InFlightLedger(), 1000.0
        self.ingresses = {name: Ingress(name) for name in "xyz"}
        self.channel: list[Placed | LoadReport] = []
        self.ids = count()

    ingress = st.sampled_from("xyz")
    instance = st.sampled_from(INSTANCES)

    @rule(name=ingress, instance=instance, used=st.sampled_from(INSTANCES), taken=st.booleans())
    def place(self, name: str, instance: str, used: str, taken: bool) -> None:
        """A scheduler places; the ingress uses it, or places elsewhere, or never gets the reply."""
        ingress, decision = self.ingresses[name], f"d{next(self.ids)}"
        self.channel.append(Placed(decision, name, str(ingress.incarnation), instance, 10))
        if taken:
            ingress.start(decision, used)
        else:
            ingress.finished.append(decision)

    @rule(name=ingress, data=st.data())
    def move_or_finish(self, name: str, data: st.DataObject) -> None:
        ingress = self.ingresses[name]
        if ingress.work:
            decision = data.draw(st.sampled_from(sorted(ingress.work)))
            if data.draw(st.booleans()):
                ingress.start(decision, data.draw(self.instance))
            else:
                del ingress.work[decision]
                ingress.finished.append(decision)

    @rule(name=ingress, whole=st.booleans(), pieces=st.integers(1, 3))
    def tell(self, name: str, whole: bool, pieces: int) -> None:
        ingress = self.ingresses[name]
        self.channel.extend(ingress.snapshot(pieces) if whole else [ingress.changes()])

    @rule(name=ingress, orderly=st.booleans())
    def restart(self, name: str, orderly: bool) -> None:
        ingress = self.ingresses[name]
        if orderly:
            self.channel.append(ingress.report([], leaving=True))
        ingress.restart()

    @rule(data=st.data(), fate=st.sampled_from(("deliver", "deliver", "deliver", "repeat", "lose")))
    def carry(self, data: st.DataObject, fate: str) -> None:
        if self.channel:
            position = data.draw(st.integers(0, len(self.channel) - 1))
            if fate != "lose":
                self.apply(self.channel[position])
            if fate != "repeat":
                del self.channel[position]

    @rule(seconds=st.sampled_from((0.01, 0.5, 1.0, 4.0)), offline=st.booleans())
    def wait(self, seconds: float, offline: bool) -> None:
        if offline:
            self.ledger.pause(self.now)
        self.now += seconds
        if offline:
            self.ledger.resume(self.now)
        self.ledger.expire(self.now)

    def apply(self, message: Placed | LoadReport) -> None:
        if isinstance(message, Placed):
            self.ledger.place(message, WINDOW_S, self.now)
        else:
            self.ledger.report(message, self.now)

    @invariant()
    def the_sums_are_sums(self) -> None:
        loads = [self.ledger.load(instance) for instance in INSTANCES]
        assert all(requests >= 0 and tokens >= 0 for requests, tokens in loads)
        assert all((requests == 0) == (tokens == 0) for requests, tokens in loads)
        assert sum(requests for requests, _ in loads) == self.ledger.in_flight

    def teardown(self) -> None:
        """Whatever happened: the stragglers come in, every ingress says all, time passes - the truth."""
        for message in self.channel:
            self.apply(message)
        for _ in range(int(SILENCE_S) + 2):
            for ingress in self.ingresses.values():
                for piece in ingress.snapshot(2):
                    self.apply(piece)
            self.now += 1.0
            self.ledger.expire(self.now)
        truth: Counter[str] = Counter()
        tokens: dict[str, int] = defaultdict(int)
        for ingress in self.ingresses.values():
            for work in ingress.work.values():
                truth[work.instance] += 1
                tokens[work.instance] += work.prompt_tokens
        for instance in INSTANCES:
            assert self.ledger.load(instance) == (truth[instance], tokens[instance])
        assert self.ledger.dirty == 0
        assert self.ledger.ingresses == len(self.ingresses)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
