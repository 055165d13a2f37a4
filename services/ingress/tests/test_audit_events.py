"""What an ingress says of its requests for audits: on disk before others act on it, decided or not, whose."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.servers import eventually

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.subjects import EVENTS
from penstock.common.user_hashes import UserHashes

from .conftest import LabOf
from .ingress_lab import Engine, Lab


def spooled(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*.segment")))


async def test_a_request_is_on_disk_before_a_scheduler_is_asked(lab_of: LabOf, tmp_path: Path) -> None:
    lab = await lab_of(audit_spool=tmp_path)
    engine = await lab.engine()
    seen: list[bytes] = []

    def decide(request: ScheduleRequest) -> Placement | Rejection:
        seen.append(spooled(tmp_path))
        return lab.scheduler.first(request)

    lab.scheduler.decide = decide
    client = await lab.client()
    client.post(x_request_id="r1")
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    (text,) = seen
    assert b'{"decision_id":"1.1","request_id":"r1","model":"m"}' in text
    assert b"penstock.outcome.v1" not in spooled(tmp_path)
    # Whoever hears that it has ended can count on its outcome.
    lab.service.publish(lab.account.changes())
    assert b"penstock.outcome.v1" in spooled(tmp_path)
    assert [event["requests"] for event in await lab.events("admitted")] == [
        [{"decision_id": "1.1", "request_id": "r1", "model": "m"}]
    ]


async def test_a_further_attempt_names_the_one_before(lab_of: LabOf, tmp_path: Path) -> None:
    lab = await lab_of(audit_spool=tmp_path)
    lab.instance("e0", 1)
    engine = await lab.engine()
    client = await lab.client()
    client.post(x_request_id="r1")
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    admitted = [one for event in await lab.events("admitted") for one in event["requests"]]
    assert [(one["decision_id"], one.get("after", "")) for one in admitted] == [("1.1", ""), ("1.2", "1.1")]


async def test_who_has_to_wait_behind_others_is_admitted_too(lab_of: LabOf, tmp_path: Path) -> None:
    lab = await lab_of(audit_spool=tmp_path)
    engine = await lab.engine()

    def one_at_a_time(request: ScheduleRequest) -> Placement | Rejection:
        if lab.account.on("e1"):
            return Rejection(request.decision_id, Reason.SATURATED, "full", 1.0)
        return lab.scheduler.first(request)

    lab.scheduler.decide = one_at_a_time
    await lab.exchange(engine)
    for name in ("first", "second"):
        (await lab.client()).post(x_request_id=name)
        await eventually(lambda name=name: f'"request_id":"{name}"'.encode() in spooled(tmp_path))  # type: ignore[misc,arg-type]


async def test_without_a_spool_there_are_no_admissions(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.answer()
    await client.response()
    assert await lab.events("admitted") == []


async def test_a_local_placement_and_a_full_pool_are_events(lab_of: LabOf) -> None:
    lab = await lab_of(max_requests_per_instance=1, waiting_limit=0)
    engine = await lab.engine()
    await lab.stop_scheduler()
    await lab.exchange(engine)
    assert (await (await lab.client()).ask()).status == 429
    (placement,) = await lab.events("placement")
    (rejection,) = await lab.events("rejection")
    assert (placement["policy"], placement["decision_id"]) == ("local", "1.1")
    assert (rejection["reason"], rejection["decision_id"]) == ("saturated", "1.2")


async def test_only_a_request_that_ends_while_it_is_asked_for_is_undecided(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.answer()
    await client.response()
    lab.scheduler.decide = lambda r: Rejection(r.decision_id, Reason.NO_INSTANCE, "none", 1.0)
    assert (await (await lab.client()).ask()).status == 503
    lab.scheduler.silent = True
    lab.scheduler.asked.clear()
    impatient = await lab.client()
    impatient.post()
    await lab.scheduler.asked.wait()
    impatient.close()
    outcomes = await lab.settled()
    assert [(one["outcome"], one.get("undecided", False)) for one in outcomes] == [
        ("completed", False),
        ("rejected", False),
        ("client_gone", True),
    ]


@pytest.mark.parametrize("salt", ["", "salt"])
async def test_users_are_named_by_hashes_and_only_if_that_is_asked_for(lab_of: LabOf, salt: str) -> None:
    lab = await lab_of(audit_user_salt=salt)
    engine = await lab.engine()
    client = await lab.client()
    client.post(user="alice")
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    await client.response()
    client.post()
    await peer.request()
    peer.answer()
    await client.response()
    named, anonymous = await lab.settled()
    assert named.get("user", "") == (UserHashes(salt)("alice") if salt else "")
    assert "user" not in anonymous
    messages = [stored.payload for stored in lab.broker.streams[EVENTS.name].messages]
    assert b"alice" not in b"".join([*lab.access_lines, *messages])
