"""The account of in-flight work stays equal to the truth, and its reports tell the truth."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.common.codec import decode, encode
from penstock.common.messages import LoadReport
from penstock.common.subjects import LOAD
from penstock.ingress.in_flight import MAX_FINISHED, PIECE_ENTRIES, InFlightAccount, Work

INSTANCES = st.sampled_from(["a", "b", "c"])
Load = dict[str, tuple[str, int, int]]


class Reader:
    """A scheduler's view of one ingress, as simple as can be: it applies reports in order."""

    def __init__(self) -> None:
        self.load: Load = {}
        self.released: set[str] = set()
        self.sequence = 0
        self._pieces: Load = {}

    def take(self, report: LoadReport) -> None:
        assert report.sequence == self.sequence + 1
        self.sequence = report.sequence
        entries = {w.decision_id: (w.instance, w.prompt_tokens, w.output_tokens) for w in report.in_flight}
        self.released.update(report.finished)
        if not report.pieces:
            self.load.update(entries)
            for decision_id in report.finished:
                self.load.pop(decision_id, None)
            return
        self._pieces = {**self._pieces, **entries} if report.piece else entries
        if report.piece == report.pieces - 1:
            self.load = self._pieces


class AccountMachine(RuleBasedStateMachine):
    """Requests start, move, progress and finish while reports go out now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.account = InFlightAccount("i", "1")
        self.reader = Reader()
        self.truth: Load = {}
        self.ended: set[str] = set()
        self.work: dict[str, Work] = {}
        self.number = 0

    @rule(instance=INSTANCES, tokens=st.integers(0, 100))
    def start(self, instance: str, tokens: int) -> None:
        self.number += 1
        self.work[f"d{self.number}"] = self.account.start(f"d{self.number}", instance, tokens)
        self.truth[f"d{self.number}"] = instance, tokens, 0

    @rule(data=st.data(), instance=INSTANCES)
    def start_one_that_runs_already_elsewhere(self, data: st.DataObject, instance: str) -> None:
        if self.truth:
            decision_id = data.draw(st.sampled_from(sorted(self.truth)))
            self.work[decision_id] = self.account.start(decision_id, instance, 7)
            self.truth[decision_id] = instance, 7, 0

    @rule(data=st.data(), tokens=st.integers(1, 50))
    def progress(self, data: st.DataObject, tokens: int) -> None:
        if self.truth:
            decision_id = data.draw(st.sampled_from(sorted(self.truth)))
            self.work[decision_id].output_tokens = tokens
            self.truth[decision_id] = (*self.truth[decision_id][:2], tokens)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.truth:
            decision_id = data.draw(st.sampled_from(sorted(self.truth)))
            self.account.finish(decision_id)
            del self.truth[decision_id]
            self.ended.add(decision_id)

    @rule(data=st.data())
    def finish_again_or_what_never_started(self, data: st.DataObject) -> None:
        decision_id = data.draw(st.sampled_from([*sorted(self.ended), f"unused{self.number}"]))
        self.account.finish(decision_id)
        self.ended.add(decision_id)

    @rule()
    def report_changes(self) -> None:
        for report in self.account.changes():
            self.reader.take(report)
        # Progress alone is no change: it waits for the next snapshot.
        assert {k: v[:2] for k, v in self.reader.load.items()} == {k: v[:2] for k, v in self.truth.items()}
        assert self.reader.released == self.ended
        assert list(self.account.changes()) == []

    @rule(leaving=st.booleans())
    def report_everything(self, leaving: bool) -> None:
        reports = list(self.account.snapshot(leaving))
        for report in reports:
            self.reader.take(report)
        assert self.reader.load == self.truth
        assert self.reader.released == self.ended
        assert reports[-1].leaving is leaving
        assert not self.account.snapshot_due

    @invariant()
    def totals_equal_the_truth(self) -> None:
        assert len(self.account) == len(self.truth)
        counts = dict.fromkeys(("a", "b", "c"), 0)
        for instance, _, _ in self.truth.values():
            counts[instance] += 1
        assert {name: self.account.on(name) for name in counts} == counts
        assert dict(self.account.by_instance()) == {name: n for name, n in counts.items() if n}


AccountMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAccount = AccountMachine.TestCase


def test_progress_is_told_by_the_next_snapshot() -> None:
    account, reader = InFlightAccount("i", "1"), Reader()
    work = account.start("d", "a", 10)
    work.output_tokens = 3
    for report in account.snapshot():
        reader.take(report)
    assert reader.load == {"d": ("a", 10, 3)}


def test_a_request_that_ends_before_the_report_is_only_reported_as_finished() -> None:
    account = InFlightAccount("i", "1")
    account.start("d", "a", 10)
    account.finish("d")
    (report,) = account.changes()
    assert (report.in_flight, report.finished, report.pieces) == ((), ("d",), 0)


def test_a_snapshot_of_nothing_is_one_empty_piece() -> None:
    (report,) = InFlightAccount("i", "1").snapshot()
    assert (report.in_flight, report.piece, report.pieces, report.sequence) == ((), 0, 1, 1)
    assert (report.ingress, report.incarnation) == ("i", "1")


def test_a_large_account_is_told_in_pieces_under_the_bound_of_the_subject() -> None:
    count, name = 3 * PIECE_ENTRIES + 1, "n" * 512
    account, reader = InFlightAccount("i" * 128, "1" * 128), Reader()
    for number in range(count):
        account.start(f"{number:0>64}", name, 2**40)
        account.finish(f"late{number:0>60}")
    reports = list(account.snapshot())
    for report in reports:
        encoded = encode(report)
        assert len(encoded) <= LOAD.max_bytes
        reader.take(decode(LoadReport, encoded))
    assert [(r.piece, r.pieces) for r in reports] == [(0, 0)] * 4 + [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert len(reader.load) == count
    assert len(reader.released) == count


def test_finishes_beyond_the_bound_are_replaced_by_a_snapshot() -> None:
    account, reader, due = InFlightAccount("i", "1"), Reader(), list[bool]()
    for report in account.snapshot():
        reader.take(report)
    account.start("stays", "a", 1)
    for number in range(MAX_FINISHED + 1):
        due.append(account.snapshot_due)
        account.finish(f"d{number}")
    assert not any(due)
    assert account.snapshot_due
    for report in account.snapshot():
        reader.take(report)
    assert reader.load.keys() == {"stays"}
    assert reader.released == {f"d{MAX_FINISHED}"}
