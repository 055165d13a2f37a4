"""What answers add to the metrics: gaps of some streams, tokens that engines report."""

from penstock.common.messages import Placement
from penstock.ingress.gateway import GAPS_OF_ONE_IN

from .ingress_lab import STREAM_BODY, Engine, Lab, Peer


async def stream(client: Peer, peer: Peer, pieces: int) -> None:
    """One stream whose pieces reach the client one by one."""
    client.post(body=STREAM_BODY)
    await peer.request()
    peer.begin_stream()
    for number in range(pieces):
        wire = peer.event(str(number))
        await client.until(wire)
    peer.send(b"0\r\n\r\n")
    await client.until(b"0\r\n\r\n")


async def test_gaps_are_measured_on_one_stream_in_eight(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post()
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    await client.response()
    assert sum(lab.gateway.gaps.counts) == 0
    await stream(client, peer, 4)
    # Its last chunk is a piece too.
    assert sum(lab.gateway.gaps.counts) == 4
    for _ in range(GAPS_OF_ONE_IN - 1):
        await stream(client, peer, 2)
    assert sum(lab.gateway.gaps.counts) == 4
    await stream(client, peer, 1)
    assert sum(lab.gateway.gaps.counts) == 5
    await lab.settled()


async def test_tokens_count_as_the_engine_reports_them(lab: Lab, engine: Engine) -> None:
    first = lab.scheduler.first

    def placed(request: object) -> Placement:
        placement = first(request)  # type: ignore[arg-type]  # a request of the lab
        assert isinstance(placement, Placement)
        return Placement(placement.decision_id, placement.instance, matched_tokens=1)

    lab.scheduler.decide = placed
    client = await lab.client()
    client.post()
    peer = await engine.accept()
    await peer.request()
    usage = b'"prompt_tokens":70,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":48}'
    peer.answer(b'{"usage":{%b}}' % usage)
    assert (await client.response()).status == 200
    (outcome,) = await lab.settled()
    assert outcome["cached_tokens"] == 48
    tokens = "penstock_ingress_tokens_total"
    assert (lab.metric(tokens, "prompt"), lab.metric(tokens, "completion")) == (70, 5)
    prefix = "penstock_ingress_prefix_tokens_total"
    assert lab.metric(prefix, "reported") == 48
    assert 0 < lab.metric(prefix, "matched") <= 70
