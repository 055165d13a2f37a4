"""No silent gap: what is killed costs the log nothing with a spool, and nothing unnamed without."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import nats
import pytest

from integration.audit_drill import (
    CLEAN,
    GAPS,
    KINDS,
    UNREAD,
    audit,
    drill,
    ingress_killed,
    settled,
    start,
)
from integration.servers import eventually, free_port
from integration.stack import MODEL, Stack, chat, running_stack
from penstock.cli.audit.verifying import Verdict
from penstock.common.routing_events import OUTCOME
from penstock.common.subjects import EVENTS, event_subject

pytestmark = pytest.mark.integration


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


async def test_with_a_spool_nothing_is_missing_whatever_is_killed(stack: Stack, tmp_path: Path) -> None:
    start(stack, "--audit-spool", str(tmp_path), schedulers=2, workers=2)
    await stack.ready()
    done = await drill(stack, 11, KINDS[:3], tmp_path)
    await stack.ready()
    verdict = await settled(stack)
    assert verdict.faults == [], (done, verdict.faults[:5])
    assert verdict.clean
    assert verdict.whole
    assert verdict.admitted >= done["answered"]
    assert verdict.finished + verdict.lost >= done["answered"]
    code, since = await audit(stack, "--since", "1h")
    assert (code, since["faults"]) == (CLEAN, [])


async def test_requests_of_an_ingress_that_died_during_an_outage_are_lost_and_nothing_else(
    stack: Stack, tmp_path: Path
) -> None:
    """NATS is away, so that nobody else knows of the requests: only the spool tells what was in hand."""
    start(stack, "--audit-spool", str(tmp_path))
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        for number in range(5):
            await chat(session, stack.url, f"before {number}")
        await asyncio.to_thread(stack.nats.kill)
        await chat(session, stack.url, "placed locally", headers={"x-request-id": "locally"})
        pending = [asyncio.create_task(hanging(session, stack.url, f"lost-{n}")) for n in range(4)]
        await eventually(lambda: b"".join(spooled(tmp_path)).count(b'"request_id":"lost-') >= 4)
        await ingress_killed(stack)
        await asyncio.gather(*pending)
    await asyncio.to_thread(stack.nats.start)
    stack.ingresses.clear()
    stack.start_ingress("--ingress-id", "another", "--audit-spool", str(tmp_path))
    await stack.ready()

    async def told() -> Verdict:
        verdict = await settled(stack)
        assert verdict.lost == 4, verdict
        return verdict

    verdict = await eventually(told)
    assert verdict.clean, verdict
    await eventually(lambda: not folders(tmp_path))


async def hanging(session: aiohttp.ClientSession, url: str, name: str) -> None:
    headers = {"x-request-id": name, "x-sim-fault": "hang-before-headers"}
    try:
        await chat(session, url, name, headers=headers)
    except aiohttp.ClientError:
        return


def folders(folder: Path) -> list[Path]:
    return list(folder.glob("ingress-i-*"))


def spooled(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.glob("ingress-i-*/*.segment")]


async def test_without_a_spool_what_is_missing_is_named_with_writer_range_and_cause(stack: Stack) -> None:
    """NATS loses its store: nothing holds what was in it."""
    start(stack)
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        for number in range(5):
            await chat(session, stack.url, f"before {number}")
        assert (await settled(stack)).clean
        await asyncio.to_thread(stack.nats.kill)
        stack.nats.wipe()
        await asyncio.to_thread(stack.nats.start)
        await stack.ready()
        await chat(session, stack.url, "after")
    verdict = await settled(stack)
    missing = {fault.writer: fault for fault in verdict.faults if fault.kind == "sequence"}
    for writer in ("scheduler/s1", "ingress/i-0"):
        assert missing[writer].first == 1
        assert missing[writer].last >= 5
        assert "made anew" in missing[writer].cause
    code, _ = await audit(stack)
    assert code == GAPS


async def test_a_message_that_was_changed_is_found(stack: Stack) -> None:
    start(stack)
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        for number in range(20):
            await chat(session, stack.url, f"request {number}", headers={"x-request-id": f"request-{number}"})
    assert (await settled(stack)).clean
    await stored_again_and_changed(stack)
    code, verdict = await audit(stack, "--settle", "0")
    assert (code, [fault["kind"] for fault in verdict["faults"]]) == (GAPS, ["altered"])
    # And in the server's own file.
    await asyncio.to_thread(stack.nats.kill)
    assert change(stack.nats.folder, b'"request_id":"request-7"', b'"request_id":"request-x"')
    await asyncio.to_thread(stack.nats.start)
    await stack.ready()
    again = await settled(stack)
    assert {fault.kind for fault in again.faults} & {"chain", "sequence"}, again


async def stored_again_and_changed(stack: Stack) -> None:
    """Somebody who may write stores a message a second time, beyond the server's de-duplication."""
    client = await nats.connect(stack.nats.url)
    try:
        message = await client.jetstream().get_last_msg(EVENTS.name, event_subject(OUTCOME, MODEL))
        assert message.headers is not None
        assert message.data is not None
        headers = {name: value for name, value in message.headers.items() if name != "Nats-Msg-Id"}
        forged = message.data.replace(b'"completed"', b'"failed"   ')
        assert forged != message.data
        await client.jetstream().publish(message.subject or "", forged, headers=headers)
    finally:
        await client.close()


def change(folder: Path, old: bytes, new: bytes) -> int:
    """Replace bytes in the files of the log's stream; how many there were."""
    found = 0
    for path in folder.rglob("*.blk"):
        if EVENTS.name in path.parts:
            content = path.read_bytes()
            found += content.count(old)
            path.write_bytes(content.replace(old, new))
    return found


async def test_what_cannot_be_read_is_another_exit_code(stack: Stack) -> None:
    code, _ = await audit(stack)
    assert code == UNREAD
    stack.nats.port = free_port()
    code, verdict = await audit(stack)
    assert code == UNREAD
    assert "does not answer" in json.dumps(verdict)
