"""Grants: everything on the wire has somebody who says it and somebody who hears it, and no more."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from penstock.common.permissions import (
    ARCHIVE,
    AUDITOR,
    AUDITORS_ACCOUNT,
    EXPLAINS,
    GRANTS,
    JOIN,
    REGISTER,
    SERVICES,
    SERVICES_ACCOUNT,
    Grant,
    accounts,
)
from penstock.common.subjects import (
    BUCKETS,
    CONFIG,
    COPIES,
    EVENTS,
    HEARTBEAT,
    MIRROR,
    REGISTRATIONS,
    STATUS,
    SUBJECTS,
    Subject,
    event_subject,
)

PASSWORDS = {user: f"secret of {user}" for user in GRANTS}


def covers(grant: str, subject: str) -> bool:
    """Whether a name on the bus is within a grant, its queue group aside."""
    allowed, wanted = grant.split(" ")[0].split("."), subject.split(".")
    for position, token in enumerate(allowed):
        if token == ">":
            return len(wanted) > position
        if position >= len(wanted) or token not in ("*", wanted[position]):
            return False
    return len(allowed) == len(wanted)


def may_publish(subject: str) -> set[str]:
    return {user for user, grant in GRANTS.items() if any(covers(one, subject) for one in grant.publish)}


def may_subscribe(subject: str) -> set[str]:
    return {user for user, grant in GRANTS.items() if any(covers(one, subject) for one in grant.subscribe)}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.pattern)
def test_every_subject_has_a_service_that_publishes_and_one_that_subscribes(
    subject: Subject[msgspec.Struct],
) -> None:
    name = subject.name(*["scheduler"] * subject.pattern.count("*"))
    assert may_publish(name) & SERVICES.keys()
    if subject is MIRROR:
        take = f"$JS.API.CONSUMER.MSG.NEXT.{COPIES.name}.{MIRROR.queue_group}"
        assert (may_subscribe(name), may_publish(take)) == (set(), {"mirror", JOIN})
    else:
        assert may_subscribe(name) & SERVICES.keys()


@pytest.mark.parametrize("bucket", BUCKETS, ids=lambda bucket: bucket.name)
def test_a_bucket_is_written_by_discovery_and_whoever_joins_as_it_and_some_by_others(bucket: Any) -> None:
    others = {REGISTRATIONS.name: {REGISTER}, CONFIG.name: {"ingress", "mirror"}}.get(bucket.name, set())
    assert may_publish(bucket.subject("any.key")) == {"discovery", JOIN} | others
    assert may_subscribe(bucket.subject("any.key")) == set()


@pytest.mark.parametrize(
    ("event_type", "writers"),
    [
        ("placement", {"ingress", "scheduler"}),
        ("rejection", {"ingress", "scheduler"}),
        ("outcome", {"ingress", "scheduler"}),
        ("instance", {"discovery"}),
        ("degraded", {"ingress", "scheduler", "discovery", "mirror"}),
        ("config", {"ingress", "scheduler", "discovery", "mirror"}),
        ("mirrored", {"ingress", "mirror"}),
        ("comparison", {"mirror"}),
        ("unheard-of", set()),
    ],
)
def test_an_event_is_written_by_the_services_that_have_it(event_type: str, writers: set[str]) -> None:
    subject = event_subject(event_type, "org/model")
    assert may_publish(subject) - {JOIN} == writers
    assert may_subscribe(subject) == {JOIN, AUDITOR, ARCHIVE}


@pytest.mark.parametrize("call", ["DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT", "RESTORE", "LEADER.STEPDOWN"])
def test_nobody_may_destroy_what_is_stored(call: str) -> None:
    for stream in (EVENTS.name, COPIES.name, *(bucket.stream for bucket in BUCKETS)):
        assert may_publish(f"$JS.API.STREAM.{call}.{stream}") == set()


def test_an_auditor_publishes_nothing_but_the_call_that_reads_the_log() -> None:
    assert GRANTS[AUDITOR].publish == (f"$JS.API.DIRECT.GET.{EVENTS.name}",)


def test_a_sidecar_writes_registrations_and_nothing_else() -> None:
    assert GRANTS[REGISTER] == Grant((REGISTRATIONS.subject(">"),), ("_INBOX.register.>",))


def test_whoever_joins_may_do_what_any_service_may() -> None:
    for grant in (*SERVICES.values(), GRANTS[REGISTER]):
        assert set(grant.publish) <= set(GRANTS[JOIN].publish)
        assert set(grant.subscribe) <= set(GRANTS[JOIN].subscribe)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_hears_its_own_answers_only_and_tools_are_answered_by_all(service: str) -> None:
    inbox = f"_INBOX.{service}.id.run.answers.1"
    assert may_subscribe(inbox) & SERVICES.keys() == {service}
    answering = {"ingress": {"scheduler", "discovery"}, "scheduler": {"scheduler"}}
    assert may_publish(inbox) - {JOIN} == answering.get(service, set())
    for tool in ("_INBOX.x7", "_INBOX.x7.1"):
        assert may_publish(tool) >= SERVICES.keys()


def test_requests_are_taken_within_the_queue_group_only() -> None:
    taking = [one for one in SERVICES["scheduler"].subscribe if covers(one, SUBJECTS[0].name("0"))]
    assert taking == [f"{SUBJECTS[0].pattern} scheduler"]


def test_grants_add_up_without_repeating_themselves() -> None:
    one, other = Grant(("a", "b"), ("c",)), Grant(("b",), ("c", "d"))
    assert one + other == Grant(("a", "b"), ("c", "d"))


def test_auditors_have_an_account_apart_into_which_the_log_status_and_heartbeats_alone_cross() -> None:
    made = json.loads(json.dumps(accounts(PASSWORDS)))
    users = {
        account: {user["user"]: user["password"] for user in content["users"]}
        for account, content in made.items()
    }
    assert users[AUDITORS_ACCOUNT] == {AUDITOR: PASSWORDS[AUDITOR]}
    assert users[SERVICES_ACCOUNT] == {user: PASSWORDS[user] for user in (*SERVICES, REGISTER, JOIN, ARCHIVE)}
    assert "jetstream" not in made[AUDITORS_ACCOUNT]
    subjects = EVENTS.subjects[0], STATUS.pattern, HEARTBEAT.pattern
    crossing = [*(("stream", subject) for subject in subjects), ("service", GRANTS[AUDITOR].publish[0])]
    exported = [(k, v) for one in made[SERVICES_ACCOUNT]["exports"] for k, v in one.items() if type(v) is str]
    assert [pair for pair in exported if pair[0] != "response_type"] == crossing
    assert made[AUDITORS_ACCOUNT]["imports"] == [
        {kind: {"account": SERVICES_ACCOUNT, "subject": subject}} for kind, subject in crossing
    ]
    assert all(one["accounts"] == [AUDITORS_ACCOUNT] for one in made[SERVICES_ACCOUNT]["exports"])


def test_every_user_is_limited_in_both_directions() -> None:
    for content in accounts(PASSWORDS).values():
        for user in content["users"]:
            assert user["permissions"]["publish"]["allow"]
            assert user["permissions"]["subscribe"]["allow"]


def test_schedulers_may_answer_the_tool_that_asks_them_why() -> None:
    assert "scheduler" in may_publish(f"_INBOX.{EXPLAINS}.id.incarnation.answers.1")
