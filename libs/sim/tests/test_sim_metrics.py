"""The metrics page, read by a Prometheus parser."""

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.sim import metrics
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, EngineSpec

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

LABELS = (("engine", "0"), ("model_name", "m"))


def parse(page: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.fixture
def engine() -> Engine:
    """One request done, one decoding, one waiting."""
    engine = Engine(
        EngineSpec(max_batch=1, prefill_tokens_per_s=100.0, decode_step_s=1.0, kv_blocks=10, block_size=10)
    )
    for name, output in (("done", 2), ("decoding", 9), ("waiting", 1)):
        engine.submit(EngineRequest(name, 20, output, (1,)), 0.0)
    now = 0.0
    for _ in range(4):
        now += engine.start_step(now) or 0.0
        engine.end_step(now)
    return engine


def test_vllm_names_carry_the_state_of_the_engine(engine: Engine) -> None:
    samples = parse(metrics.render(engine, "m", "vllm"))
    expected = {
        "vllm:num_requests_running": 1,
        "vllm:num_requests_waiting": 1,
        "vllm:kv_cache_usage_perc": 0.3,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 10,
        "vllm:prompt_tokens_total": 40,
        "vllm:generation_tokens_total": 4,
        "vllm:num_preemptions_total": 0,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 1,
    }
    assert {name: samples[name, LABELS] for name in expected} == expected
    done = tuple(sorted((*LABELS, ("finished_reason", "stop"))))
    assert samples["vllm:request_success_total", done] == 1


def test_buckets_are_cumulative_up_to_the_count(engine: Engine) -> None:
    samples = parse(metrics.render(engine, "m", "vllm"))
    name = "vllm:time_to_first_token_seconds"
    buckets = [
        (float(dict(labels)["le"]), value)
        for (sample, labels), value in samples.items()
        if sample == f"{name}_bucket"
    ]
    buckets.sort()
    counts = [value for _, value in buckets]
    assert counts == sorted(counts)
    assert buckets[-1] == (float("inf"), samples[f"{name}_count", LABELS])
    # First tokens after 0.2 s, and after 1.2003 s of the first request and 0.1 s of one's own.
    assert samples[f"{name}_sum", LABELS] == pytest.approx(1.5003)


def test_the_cache_configuration_is_a_gauge_with_labels(engine: Engine) -> None:
    families = text_string_to_metric_families(metrics.render(engine, "m", "vllm"))
    (sample,) = (s for family in families for s in family.samples if s.name == "vllm:cache_config_info")
    assert (sample.labels["block_size"], sample.labels["num_gpu_blocks"]) == ("10", "10")


def test_sglang_names_carry_the_same_state(engine: Engine) -> None:
    samples = parse(metrics.render(engine, "m", "sglang"))
    labels = (("model_name", "m"),)
    assert samples["sglang:num_running_reqs", labels] == 1
    assert samples["sglang:num_queue_reqs", labels] == 1
    assert samples["sglang:token_usage", labels] == pytest.approx(0.3)
    assert samples["sglang:cache_hit_rate", labels] == pytest.approx(0.25)


def test_label_values_are_escaped() -> None:
    name = 'a"b\\c\nd'
    samples = parse(metrics.render(Engine(EngineSpec()), name, "vllm"))
    assert {dict(labels)["model_name"] for _, labels in samples} == {name}


async def test_a_scrape_counts_what_was_served(client: Any, chat_body: Any) -> None:
    await asyncio.gather(*(client.post("/v1/chat/completions", chat_body) for _ in range(5)))
    samples = parse(await client.text("/metrics"))
    labels = (("engine", "0"), ("model_name", "sim-model"))
    assert samples["vllm:generation_tokens_total", labels] == 40
    assert samples["vllm:num_requests_running", labels] == 0
