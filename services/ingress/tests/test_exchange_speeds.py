"""What exchanges tell the schedulers of how fast instances serve."""

from integration.servers import eventually

from penstock.common.messages import InstanceSpeed

from .ingress_lab import STREAM_BODY, Engine, Lab


def speeds(lab: Lab) -> list[InstanceSpeed]:
    reports = lab.account.speeds(lab.gateway.speeds.report())
    return [speed for report in reports for speed in report.speeds]


async def test_the_first_piece_of_a_stream_tells_that_its_prompt_is_computed(
    lab: Lab, engine: Engine
) -> None:
    client = await lab.client()
    client.post(body=STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    (started,) = [entry for report in lab.reports() for entry in report.in_flight]
    assert started.output_tokens == 0
    peer.begin_stream()
    peer.event("{}")
    await eventually(lambda: speeds(lab))
    (begun,) = [entry for report in lab.reports() for entry in report.in_flight]
    assert (begun.decision_id, begun.output_tokens) == (started.decision_id, 1)


async def test_a_complete_answer_counts_its_tokens_and_a_failed_one_counts_nothing(
    lab: Lab, engine: Engine
) -> None:
    client = await lab.client()
    client.post()
    peer = await engine.accept()
    await peer.request()
    peer.answer(b'{"usage":{"prompt_tokens":70,"completion_tokens":5}}')
    assert (await client.response()).status == 200
    (speed,) = speeds(lab)
    assert (speed.requests, speed.prompt_tokens, speed.output_tokens, speed.streams) == (1, 70, 5, 0)
    assert speed.decode_tokens == 4
    client.post()
    await peer.request()
    peer.answer(b"{}", "429 Too Many Requests")
    assert (await client.response()).status == 429
    assert speeds(lab) == []
