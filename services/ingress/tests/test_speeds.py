"""What an ingress says of its instances' speed."""

from __future__ import annotations

import pytest

from penstock.common.messages import MAX_REPORT_SPEEDS, InstanceSpeed
from penstock.ingress.speeds import MAX_INSTANCES, Speeds


def sums(speeds: Speeds) -> dict[str, InstanceSpeed]:
    return {speed.instance: speed for report in speeds.report() for speed in report}


def test_of_prompts_that_queue_only_the_time_at_the_head_counts_as_prefill() -> None:
    speeds = Speeds()
    # Sent together, computed one after the other in 0.25 s each; a third after a pause.
    speeds.first_token("a", 10.0, 10.25, 2000)
    speeds.first_token("a", 10.0, 10.5, 2000)
    speeds.first_token("a", 20.0, 20.25, 2000)
    speed = sums(speeds)["a"]
    assert (speed.streams, speed.ttft_ms) == (3, 1000)
    assert (speed.prefill_ms, speed.uncached_tokens) == (750, 6000)


def test_short_prompts_say_nothing_of_prefill() -> None:
    speeds = Speeds()
    speeds.first_token("a", 1.0, 1.05, 20)
    speed = sums(speeds)["a"]
    assert (speed.streams, speed.ttft_ms, speed.prefill_ms, speed.uncached_tokens) == (1, 50, 0, 0)


@pytest.mark.parametrize(
    ("output", "decode_ms", "decoded"), [(0, 0, 0), (1, 0, 0), (2, 500, 1), (51, 500, 50)]
)
def test_tokens_after_the_first_took_the_time_after_the_first(
    output: int, decode_ms: int, decoded: int
) -> None:
    speeds = Speeds()
    speeds.answered("a", 100, output, 1.0, 1.5)
    assert sums(speeds)["a"] == InstanceSpeed("a", 1, 100, output, 0, 0, 0, 0, decode_ms, decoded)


def test_sums_grow_and_only_what_changed_is_told() -> None:
    speeds = Speeds()
    speeds.answered("a", 100, 11, 1.0, 1.5)
    speeds.answered("b", 100, 11, 1.0, 1.5)
    assert set(sums(speeds)) == {"a", "b"}
    speeds.answered("a", 50, 11, 2.0, 2.5)
    (speed,) = sums(speeds).values()
    assert (speed.instance, speed.requests, speed.prompt_tokens, speed.decode_ms) == ("a", 2, 150, 1000)
    assert sums(speeds) == {}


def test_a_clock_that_does_not_fit_adds_nothing() -> None:
    speeds = Speeds()
    speeds.first_token("a", 5.0, 4.0, 1000)
    speeds.answered("a", 1, 5, 9.0, 8.0)
    speed = sums(speeds)["a"]
    assert (speed.ttft_ms, speed.prefill_ms, speed.decode_ms) == (0, 0, 0)


def test_reports_and_memory_are_bounded() -> None:
    speeds = Speeds()
    for number in range(MAX_INSTANCES + 10):
        speeds.answered(f"i{number}", 1, 1, 1.0, 1.0)
    reports = list(speeds.report())
    assert sum(map(len, reports)) == 10
    for number in range(MAX_REPORT_SPEEDS + 1):
        speeds.answered(f"i{number}", 1, 1, 1.0, 1.0)
    assert [len(report) for report in speeds.report()] == [MAX_REPORT_SPEEDS, 1]
