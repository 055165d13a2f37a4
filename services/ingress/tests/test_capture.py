"""Copies of requests leave the ingress, and nothing that happens to them reaches a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from integration.servers import eventually

from penstock.common.adapters.memory_bus import MemoryBus
from penstock.common.codec import decode
from penstock.common.config_keeping import ConfigWriter
from penstock.common.live_config import LiveConfig
from penstock.common.messages import MirrorCopy, MirrorPrimary
from penstock.common.mirroring import MirrorConfig
from penstock.common.subjects import CONFIG, COPIES, EVENTS, MIRROR, MIRROR_PRIMARY
from penstock.ingress.capture import MAX_WAITING_BYTES, Capture
from penstock.ingress.http_wire import parse_request

from .ingress_lab import BODY, CHAT, MODEL, Engine, Lab


def config(**fields: Any) -> MirrorConfig:
    return MirrorConfig.model_validate({"Enable": True, "Target": "http://shadow", "Ratio": 100} | fields)


@asynccontextmanager
async def mirrored(lab: Lab, *, forward_credentials: bool = False, **fields: Any) -> AsyncIterator[Capture]:
    """The lab's ingress copies its requests."""
    await lab.bus.ensure_stream(COPIES)
    gateway = lab.gateway
    capture = Capture(
        lab.bus, lab.writer, gateway.identity, lab.metrics, forward_credentials=forward_credentials
    )
    capture.config = config(**fields)
    gateway.capture = capture
    sending = asyncio.create_task(capture.run())
    try:
        yield capture
    finally:
        gateway.capture = None
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def copies(lab: Lab) -> list[MirrorCopy]:
    return [decode(MirrorCopy, stored.payload) for stored in lab.broker.streams[COPIES.name].messages]


async def asked(lab: Lab, engine: Engine, body: bytes = BODY, answer: bytes = b"{}", **headers: str) -> None:
    """One request, answered."""
    client, peer = await lab.client(), None
    client.post(body, **headers)
    peer = await engine.accept()
    await peer.request()
    peer.answer(answer, "200 OK", "connection: close")
    assert (await client.response()).status == 200
    peer.close()
    client.close()


def counted(lab: Lab, result: str) -> float:
    return lab.metric("penstock_ingress_mirror_copies_total", result)


async def test_a_copy_is_its_request_without_credentials(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab):
        await asked(lab, engine, authorization="Bearer s", x_own="kept", x_request_id="r-1")
        await eventually(lambda: copies(lab))
    (copy,) = copies(lab)
    assert (copy.method, copy.target, copy.body, copy.request_id) == (b"POST", CHAT.encode(), BODY, "r-1")
    assert copy.headers == b"content-type: application/json\r\nx-own: kept\r\n"
    assert (copy.model, copy.compared, counted(lab, "sent")) == (MODEL, False, 1)


async def test_credentials_stay_when_they_are_to_be_forwarded(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab, forward_credentials=True):
        await asked(lab, engine, authorization="Bearer s")
        await eventually(lambda: copies(lab))
    assert b"authorization: Bearer s\r\n" in copies(lab)[0].headers


async def test_the_ratio_counts_requests(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab, Ratio=50):
        for _ in range(10):
            await asked(lab, engine)
        await eventually(lambda: len(copies(lab)) == 5)


async def test_what_is_refused_is_not_copied(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab):
        client = await lab.client()
        assert (await client.ask(b"{}")).status == 400
        assert (await client.ask(b'{"model":"unknown","messages":[{}]}')).status == 404
        await asked(lab, engine)
        await eventually(lambda: len(copies(lab)) == 1)


def of_size(size: int) -> bytes:
    body = b'{"model":"%b","messages":[{"content":"' % MODEL.encode()
    return body + b"x" * (size - len(body) - 4) + b'"}]}'


async def test_a_large_request_is_copied_and_one_over_the_bound_is_dropped(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab):
        fits, too_large = of_size(MIRROR.max_bytes - 8192), of_size(MIRROR.max_bytes)
        await asked(lab, engine, too_large)
        await asked(lab, engine, fits)
        await eventually(lambda: copies(lab))
    assert [copy.body for copy in copies(lab)] == [fits]
    assert (counted(lab, "sent"), counted(lab, "oversize")) == (1, 1)
    (event,) = await lab.events("mirrored")
    assert (event["result"], event["reason"]) == ("dropped", "oversize")
    assert b"xxx" not in b"".join(m.payload for m in lab.broker.streams[EVENTS.name].messages)


async def test_without_the_bus_copies_are_dropped_and_counted(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab):
        lab.broker.set_up(False)
        await asked(lab, engine)
        await eventually(lambda: counted(lab, "bus") == 1)
        lab.broker.set_up(True)
        await asked(lab, engine)
        await eventually(lambda: len(copies(lab)) == 1)


async def test_more_than_may_wait_is_dropped_and_counted(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab) as capture:
        body = of_size(MIRROR.max_bytes - 8192)
        head = parse_request(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n")
        for number in range(20):
            assert capture.copy(head, body, MODEL, f"{number}") is None
        kept = MAX_WAITING_BYTES // MIRROR.max_bytes
        assert counted(lab, "too many at once") == 20 - kept
        await eventually(lambda: [copy.request_id for copy in copies(lab)] == [f"{n}" for n in range(kept)])


async def test_a_fault_of_the_capture_costs_the_copy_and_not_the_request(lab: Lab, engine: Engine) -> None:
    async with mirrored(lab) as capture:
        capture.config = None  # type: ignore[assignment]
        await asked(lab, engine)
        assert counted(lab, "fault") == 1


async def test_how_a_compared_request_ended_is_told_to_the_mirrors(lab: Lab, engine: Engine) -> None:
    told: list[MirrorPrimary] = []
    await MemoryBus(lab.broker).subscribe(MIRROR_PRIMARY, told.append)
    answer = b'{"choices":[{"finish_reason":"stop"}],"usage":{"completion_tokens":7}}'
    async with mirrored(lab, Compare=True):
        await asked(lab, engine, answer=answer)
        await eventually(lambda: copies(lab) and told)
    (copy,), (primary,) = copies(lab), told
    assert copy.compared
    assert (primary.id, primary.status, primary.bytes_out) == (copy.id, 200, len(answer))
    assert (primary.completion_tokens, primary.finish_reason) == (7, "stop")
    assert 0 < primary.ttft_ms <= primary.e2e_ms


async def test_the_live_configuration_switches_it_on_and_off(lab: Lab, engine: Engine) -> None:
    await lab.bus.ensure_stream(COPIES)
    await lab.bus.ensure_bucket(CONFIG)
    live = LiveConfig(keeps=True)
    capture = Capture(lab.bus, lab.writer, lab.gateway.identity, lab.metrics, forward_credentials=False)
    work = [asyncio.create_task(loop) for loop in (lab.service.follow_config(live, capture), capture.run())]
    writer = ConfigWriter(lab.bus, live)
    on = {"Enable": True, "Target": "http://shadow", "Ratio": 100}
    try:
        await eventually(lambda: live.synced)
        for value, copied in ((on, 1), (on | {"Enable": False}, 1), ({"Ratio": -1}, 1), (on, 2)):
            await writer.put("mirror", "", value, "test", "admin")
            await asked(lab, engine)
            await eventually(lambda: len(copies(lab)) == copied)  # noqa: B023
            assert (lab.gateway.capture is not None) is (value == on)
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
