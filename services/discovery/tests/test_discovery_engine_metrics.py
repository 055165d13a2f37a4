"""Engine metrics: both engines' names, several engines behind one address, and hostile text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.model import EngineLoad
from penstock.discovery import engine_metrics
from penstock.discovery.engine_metrics import absurd_figures, parse_engine_load

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1234",note="a}\\"b,"} 1.0
vllm:request_success_total{finished_reason="stop"} 5.0
"""


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (VLLM, EngineLoad(3, 7, 0.25, 1234, 16)),
        (VLLM.replace(b"\n", b"\r\n"), EngineLoad(3, 7, 0.25, 1234, 16)),
        (b"vllm:gpu_cache_usage_perc 0.5", EngineLoad(kv_usage_ratio=0.5)),
        (
            b'sglang:num_running_reqs{tp_rank="0"} 2\nsglang:num_queue_reqs 4\n'
            b"sglang:token_usage 0.75 1395066363000\n",
            EngineLoad(2, 4, 0.75),
        ),
        (
            b'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 4\n'
            b'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.9\n'
            b'vllm:cache_config_info{engine="0",block_size="16",num_gpu_blocks="10"} 1\n'
            b'vllm:cache_config_info{engine="1",block_size="16",num_gpu_blocks="20"} 1\n',
            EngineLoad(running=7, kv_usage_ratio=0.9, kv_blocks=30, block_size=16),
        ),
        (b"vllm:num_requests_running 0\n", EngineLoad(running=0)),
        (b'vllm:nixl_num_kv_expired_reqs_total{engine="0"} 2\n', EngineLoad(kv_expired=2)),
        (b"vllm:nixl_num_kv_expired_reqs 3\n", EngineLoad(kv_expired=3)),
        (b"", EngineLoad()),
    ],
    ids=[
        "vllm",
        "crlf",
        "old name",
        "sglang",
        "two engines",
        "idle",
        "expired",
        "expired, old name",
        "empty",
    ],
)
def test_load_is_read_from_an_engines_own_names(text: bytes, load: EngineLoad) -> None:
    assert parse_engine_load(text) == load
    assert absurd_figures(text) == []


@pytest.mark.parametrize("value", [b"NaN", b"+Inf", b"-Inf", b"-1", b"1e300", b"2e9", b"x", b"", b"0x10"])
def test_a_figure_that_is_no_load_is_unknown(value: bytes) -> None:
    text = b"vllm:num_requests_running " + value + b"\nvllm:num_requests_waiting 2\n"
    assert parse_engine_load(text) == EngineLoad(waiting=2)
    # Without a value it is not a sample at all.
    assert absurd_figures(text) == (["vllm:num_requests_running"] if value else [])


def test_one_bad_engine_does_not_hide_the_others() -> None:
    assert parse_engine_load(b"vllm:kv_cache_usage_perc NaN\nvllm:kv_cache_usage_perc 0.5\n") == EngineLoad(
        kv_usage_ratio=0.5
    )


def test_usage_above_one_counts_as_full() -> None:
    assert parse_engine_load(b"sglang:token_usage 1.7\n") == EngineLoad(kv_usage_ratio=1.0)


@pytest.mark.parametrize(
    "text",
    [
        b"x vllm:num_requests_running 3",
        b"vllm:num_requests_runningx 3",
        b'vllm:num_requests_running{a="b} 3',
        b"vllm:num_requests_running{a=b 3",
        b"vllm:num_requests_running 3 4 5",
        b'vllm:num_requests_running{a="' + b"x" * engine_metrics.MAX_LINE_BYTES + b'"} 3',
        b'vllm:cache_config_info{block_size="None",num_gpu_blocks="9999999999"} 1',
        b'vllm:cache_config_info{x="\\",block_size=\\"16\\""} 1',
    ],
)
def test_a_line_that_is_not_a_sample_says_nothing(text: bytes) -> None:
    assert parse_engine_load(text) == EngineLoad()


def test_lines_past_the_bound_are_not_read() -> None:
    text = b"vllm:num_requests_running 1\n" * (engine_metrics.MAX_HITS + 100)
    assert parse_engine_load(text) == EngineLoad(running=engine_metrics.MAX_HITS)


PIECES = [
    *(b"vllm:num_requests_running", b"sglang:token_usage", b"vllm:cache_config_info", b"block_size="),
    *(b"\n", b" ", b"{", b"}", b'"', b"\\", b"1e9", b"nan", b"-", b"7", b"#", b"\xff"),
]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=60).map(b"".join))
def test_no_text_raises_and_every_figure_is_usable(text: bytes) -> None:
    load = parse_engine_load(text)
    assert load.running is None or 0 <= load.running <= 1e13
    assert load.kv_usage_ratio is None or 0 <= load.kv_usage_ratio <= 1
