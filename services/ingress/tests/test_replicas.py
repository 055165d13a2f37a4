"""Which scheduler is asked: those that are heard, ready and answering, in turn."""

from penstock.common.messages import Heartbeat
from penstock.ingress.replicas import ANY, SILENCE_S, SUSPECT_S, Replicas


def beat(name: str, *, ready: bool = True) -> Heartbeat:
    return Heartbeat("scheduler", name, "run", ready)


def picks(replicas: Replicas, now: float, count: int = 12) -> dict[str, int]:
    names = [replicas.pick(now) for _ in range(count)]
    return {name: names.count(name) for name in names}


def heard(*names: str, now: float = 0.0) -> Replicas:
    replicas = Replicas()
    for name in names:
        replicas.heard(beat(name), now)
    return replicas


def test_nobody_heard_leaves_it_to_the_queue_group() -> None:
    assert Replicas().pick(0.0) == ANY


def test_replicas_take_turns() -> None:
    assert picks(heard("a", "b", "c"), 1.0) == {"a": 4, "b": 4, "c": 4}


def test_a_replica_that_did_not_answer_is_left_alone_until_it_has_to_be_heard_anew() -> None:
    replicas = heard("a", "b")
    replicas.silent("a", 0.0)
    assert picks(replicas, 1.0) == {"b": 12}
    replicas.heard(beat("b"), SUSPECT_S)
    assert picks(replicas, SUSPECT_S + 0.1) == {"b": 12}
    replicas.heard(beat("a"), SUSPECT_S)
    assert picks(replicas, SUSPECT_S + 0.1) == {"a": 6, "b": 6}


def test_a_replica_that_answers_again_has_to_wait_for_its_suspicion_to_end() -> None:
    replicas = heard("a", "b", now=1.0)
    replicas.silent("a", 1.0)
    replicas.heard(beat("a"), 2.0)
    assert picks(replicas, 2.1) == {"b": 12}
    replicas.heard(beat("b"), 3.9)
    replicas.heard(beat("a"), 3.9)
    assert picks(replicas, 1.0 + SUSPECT_S) == {"a": 6, "b": 6}


def test_when_all_are_silent_the_queue_group_decides() -> None:
    replicas = heard("a")
    replicas.silent("a", 0.0)
    assert replicas.pick(0.1) == ANY
    assert heard("a").pick(SILENCE_S + 0.1) == ANY


def test_a_replica_is_suspect_until_its_suspicion_ends_or_it_is_gone() -> None:
    replicas = heard("a", "b")
    replicas.silent("a", 0.0)
    assert [replicas.suspects(now) for now in (0.1, SUSPECT_S)] == [1, 0]
    replicas.silent("b", 0.0)
    replicas.gone("b")
    assert replicas.suspects(0.1) == 1


def test_a_replica_that_leaves_is_asked_no_more() -> None:
    replicas = heard("a", "b")
    replicas.heard(beat("a", ready=False), 0.1)
    assert picks(replicas, 0.2) == {"b": 12}
    replicas.gone("b")
    assert replicas.pick(0.2) == ANY
