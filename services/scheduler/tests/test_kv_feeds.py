"""What engines say of their KV caches: followed while it is whole, used while it proves right."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from penstock.common.bus import Change, Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    CompleteMarker,
    InstanceSpeed,
    KvChange,
    KvEvents,
    LoadReport,
    Placement,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, Instance, InstanceState
from penstock.scheduler import feed as feed_module
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.precision import TRIAL_AFTER, WINDOW, Trust, Window
from penstock.scheduler.replica import Replica

PROMPT = np.arange(1, 9, dtype="<u8") * 2**40
A, B = "a", "b"


def instance(name: str, **fields: object) -> Instance:
    return msgspec.structs.replace(Instance(id=name, endpoint=Endpoint("h", 1), models=("m",)), **fields)


class Lab:
    """A replica and two instances."""

    def __init__(self, prefix_max_age_s: float = 0.0) -> None:
        self.replica = Replica(
            Identity("scheduler", "s", "1"),
            Catalog(Thresholds()),
            "prefix-cache",
            10_000,
            prefix_max_age_s=prefix_max_age_s,
        )
        self.revision = 3
        marker = CompleteMarker("x", ("x",))
        entries = {complete_key("x"): Entry(encode_record(marker), 1)} | {
            instance_key(name): Entry(encode_instance(instance(name)), 2) for name in (A, B)
        }
        self.replica.registry(Listing(Position("i", 3), entries))
        self.judged = 0

    def change(self, changed: Instance | None, name: str) -> None:
        self.revision += 1
        entry = None if changed is None else Entry(encode_instance(changed), self.revision)
        self.replica.registry(Change(Position("i", self.revision), instance_key(name), entry))

    def say(
        self,
        sequence: int,
        *,
        name: str = A,
        feed: str = "f",
        stored: int = 0,
        removed: int = 0,
        **fields: bool,
    ) -> None:
        changes = []
        if stored:
            changes.append(KvChange(True, PROMPT[:stored].tobytes()))
        if removed:
            changes.append(KvChange(False, PROMPT[::-1][:removed].tobytes()))
        self.replica.kv_events(KvEvents(name, feed, sequence, changes=tuple(changes), **fields), 0.0)

    def slot(self, name: str) -> int:
        slot = self.replica.view.slot(name)
        assert slot is not None
        return slot

    def matched(self, name: str = A) -> int:
        """Blocks that a request which may only go to `name` finds there."""
        excluded = tuple({A, B} - {name})
        request = ScheduleRequest(
            "d", "r", "m", prompt_tokens=128, block_hashes=PROMPT.tobytes(), excluded=excluded
        )
        outcome = self.replica.decide(request, 0.0).outcome
        assert isinstance(outcome, Placement)
        return outcome.matched_blocks

    def answers(self, count: int, precision: float, name: str = A) -> None:
        """An ingress reports answers in portions of 10."""
        for _ in range(count // 10):
            self.judged += 10
            sums = InstanceSpeed(
                name,
                judged=self.judged,
                expected_tokens=100 * self.judged,
                confirmed_tokens=round(100 * self.judged * precision),
            )
            self.sequence = getattr(self, "sequence", 0) + 1
            self.replica.report(LoadReport("i", "1", self.sequence, speeds=(sums,)), 0.0)


def test_stored_blocks_match_and_removed_ones_no_longer() -> None:
    lab = Lab()
    lab.say(1, stored=8)
    assert (lab.matched(A), lab.matched(B)) == (8, 0)
    lab.say(2, removed=3)
    assert lab.matched() == 5
    lab.say(3, cleared=True)
    assert lab.matched() == 0


def test_what_engines_say_while_a_snapshot_comes_in_is_applied_after_it_and_once() -> None:
    lab = Lab()
    lab.say(1, stored=4)
    lab.replica.hold()
    lab.say(2, removed=2)
    lab.say(3, stored=8)
    lab.say(4, removed=3)
    # The sibling had heard the first of them when it told the prompt.
    lab.replica.index.restore([int(block) >> 4 for block in PROMPT], 1 << lab.slot(A))
    assert (lab.matched(), lab.replica.behind) == (8, 0)
    assert lab.replica.catch_up(0.0, 2)
    assert not lab.replica.catch_up(0.0, 2)
    assert lab.matched() == 5
    assert lab.replica.kv_feeds.results == {
        **dict.fromkeys(lab.replica.kv_feeds.results, 0),
        "applied": 4,
    }
    lab.say(5, removed=8)
    assert lab.matched() == 0


def test_of_what_waits_for_a_snapshot_the_oldest_is_applied_when_there_is_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "MAX_BACKLOG", 2)
    lab = Lab()
    lab.replica.hold()
    for sequence in range(1, 6):
        lab.say(sequence, stored=sequence)
    assert (lab.matched(), lab.replica.kv_feeds.results["applied"]) == (3, 3)


@pytest.mark.parametrize(("feed", "sequence"), [("f", 3), ("f", 1), ("g", 1), ("g", 2)])
def test_what_is_held_is_forgotten_when_messages_are_missing(feed: str, sequence: int) -> None:
    lab = Lab()
    lab.say(1, stored=8)
    lab.say(1, name=B, stored=8)
    lab.say(sequence, feed=feed)
    assert (lab.matched(A), lab.matched(B)) == (0, 8)
    assert lab.replica.kv_feeds.results["gap"] == 1


def test_a_feed_joined_late_adds_to_what_placements_said() -> None:
    lab = Lab()
    slot = lab.replica.view.slot(A)
    assert slot is not None
    lab.replica.index.insert((PROMPT >> np.uint64(4)).tolist(), slot)
    lab.say(7)
    assert lab.matched() == 8


def test_an_instance_that_left_and_came_back_holds_nothing() -> None:
    lab = Lab()
    lab.say(1, stored=8)
    lab.change(None, A)
    lab.say(2, stored=8)
    lab.change(instance(A), A)
    assert lab.matched() == 0
    assert lab.replica.kv_feeds.results["unknown_instance"] == 1


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"state": InstanceState.UNHEALTHY, "reason": "connection refused"}, 0),
        ({"state": InstanceState.UNHEALTHY, "reason": "no answer within 2 s"}, 8),
        ({"endpoint": Endpoint("other", 1)}, 0),
        ({"labels": {"x": "y"}}, 8),
    ],
)
def test_a_process_that_is_gone_or_elsewhere_has_lost_its_cache(fields: dict[str, object], kept: int) -> None:
    lab = Lab()
    slot = lab.replica.view.slot(A)
    assert slot is not None
    lab.replica.index.insert((PROMPT >> np.uint64(4)).tolist(), slot)
    lab.change(instance(A, **fields), A)
    lab.change(instance(A, endpoint=fields.get("endpoint", Endpoint("h", 1))), A)
    assert lab.matched() == kept


def test_old_blocks_are_forgotten_by_their_age() -> None:
    lab = Lab(prefix_max_age_s=60.0)
    lab.say(1, stored=8)
    for now in (0.0, 31.0):
        lab.replica.expire(now)
    assert lab.matched() == 8
    lab.replica.expire(62.0)
    lab.replica.expire(93.0)
    assert lab.matched() == 0


def test_an_imprecise_feed_is_not_used_until_a_trial_and_then_judged_again() -> None:
    lab = Lab()
    lab.say(1, stored=8)
    # The first report of an ingress is what the next ones are counted from.
    lab.answers(WINDOW, 0.5)
    assert lab.matched() == 8
    lab.answers(10, 0.5)
    feeds = lab.replica.kv_feeds
    assert lab.matched() == 0
    (change,) = feeds.changes()
    assert (change.instance, change.trusted, change.precision) == (A, False, 0.5)
    assert feeds.counts() == (1, 1)
    lab.say(2, stored=8)
    assert lab.matched() == 0
    lab.answers(TRIAL_AFTER, 0.5)
    (change,) = feeds.changes()
    assert (change.instance, change.trusted) == (A, True)
    lab.say(3, stored=8)
    assert lab.matched() == 8
    assert feeds.counts() == (1, 0)


def test_precision_is_known_by_instance_and_feed() -> None:
    lab = Lab()
    lab.say(1)
    lab.answers(50, 0.9, A)
    lab.judged = 0
    lab.answers(50, 0.6, B)
    precisions = dict(lab.replica.kv_feeds.precisions())
    assert precisions == {(A, "events"): pytest.approx(0.9), (B, "placements"): pytest.approx(0.6)}


def test_sums_that_fall_or_are_absurd_count_for_nothing() -> None:
    lab = Lab()
    lab.say(1, stored=8)
    for number, (judged, expected, confirmed) in enumerate(
        [(10, 100, 100), (5, 50, 50), (2**40, 2**40, 0), (0, 0, 0), (10, 0, 2**40)], 1
    ):
        sums = InstanceSpeed(A, judged=judged, expected_tokens=expected, confirmed_tokens=confirmed)
        lab.replica.report(LoadReport("i", "1", number, speeds=(sums,)), 0.0)
    assert lab.matched() == 8


def test_a_window_holds_the_last_answers() -> None:
    window = Window()
    for _ in range(100):
        window.add(5, 100, 0)
    for _ in range(40):
        window.add(5, 100, 90)
    assert window.answers == WINDOW
    assert window.precision == pytest.approx(0.9)


def test_each_failed_trial_doubles_the_wait_and_a_passed_one_ends_that() -> None:
    trust, waits = Trust(), []
    for precision in (0.5, 0.5, 0.5, 1.0, 0.5):
        answers = 0
        while not trust.judge(10, 100, round(100 * precision)):
            answers += 10
            if answers > WINDOW and precision == 1.0:
                break
        answers = 0
        while not trust.trusted and not trust.judge(10, 100, 100):
            answers += 10
        waits.append(answers + 10 if answers else 0)
    assert waits == [200, 400, 800, 0, 200]
