"""The metrics page of an engine in Prometheus text format, under vLLM's or SGLang's names."""

from collections.abc import Mapping
from typing import Literal

from penstock.sim.engine import Engine
from penstock.sim.stats import Histogram

MetricsStyle = Literal["vllm", "sglang"]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(engine: Engine, model: str, style: MetricsStyle, expired: int | None = None) -> str:
    """`expired`: prompts kept for decode that nobody fetched; None if none are kept at all."""
    page = _Page(f'model_name="{_escape(model)}"')
    if style == "vllm":
        _vllm(page, engine)
        if expired is not None:
            page.counter("vllm:nixl_num_kv_expired_reqs_total", expired)
    else:
        _sglang(page, engine)
    return page.text()


def _vllm(page: "_Page", engine: Engine) -> None:
    page.labels = f'engine="0",{page.labels}'
    spec, stats = engine.spec, engine.stats
    page.gauge("vllm:num_requests_running", engine.running)
    page.gauge("vllm:num_requests_waiting", engine.waiting)
    page.gauge("vllm:kv_cache_usage_perc", engine.kv_usage_ratio)
    cache = f'block_size="{spec.block_size}",enable_prefix_caching="True",num_gpu_blocks="{spec.kv_blocks}"'
    page.gauge("vllm:cache_config_info", 1, cache)
    page.counter("vllm:prefix_cache_queries_total", stats.prefix_queries)
    page.counter("vllm:prefix_cache_hits_total", stats.prefix_hits)
    page.counter("vllm:prompt_tokens_total", stats.prompt_tokens)
    page.counter("vllm:prompt_tokens_cached_total", stats.prefix_hits)
    page.counter("vllm:generation_tokens_total", stats.generation_tokens)
    page.counter("vllm:num_preemptions_total", stats.preemptions)
    reasons = {f'finished_reason="{reason}"': count for reason, count in stats.finished.items()}
    page.family("vllm:request_success_total", "counter", reasons)
    page.histogram("vllm:time_to_first_token_seconds", stats.ttft)
    page.histogram("vllm:inter_token_latency_seconds", stats.itl)
    page.histogram("vllm:e2e_request_latency_seconds", stats.e2e)
    page.histogram("vllm:request_queue_time_seconds", stats.queue)
    page.histogram("vllm:request_prefill_time_seconds", stats.prefill)
    page.histogram("vllm:request_decode_time_seconds", stats.decode)
    page.histogram("vllm:request_inference_time_seconds", stats.inference)


def _sglang(page: "_Page", engine: Engine) -> None:
    stats = engine.stats
    page.gauge("sglang:num_running_reqs", engine.running)
    page.gauge("sglang:num_queue_reqs", engine.waiting)
    page.gauge("sglang:num_used_tokens", engine.kv_blocks_used * engine.spec.block_size)
    page.gauge("sglang:max_total_num_tokens", engine.spec.kv_blocks * engine.spec.block_size)
    page.gauge("sglang:token_usage", engine.kv_usage_ratio)
    hit_ratio = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0
    page.gauge("sglang:cache_hit_rate", hit_ratio)
    page.counter("sglang:prompt_tokens_total", stats.prompt_tokens)
    page.counter("sglang:generation_tokens_total", stats.generation_tokens)
    page.counter("sglang:num_requests_total", stats.e2e.count)
    page.histogram("sglang:time_to_first_token_seconds", stats.ttft)
    page.histogram("sglang:inter_token_latency_seconds", stats.itl)
    page.histogram("sglang:e2e_request_latency_seconds", stats.e2e)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Page:
    def __init__(self, labels: str) -> None:
        self.labels = labels
        self._lines: list[str] = []

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def family(self, name: str, kind: str, samples: Mapping[str, float]) -> None:
        """`samples`: further labels to value."""
        self._lines.append(f"# TYPE {name} {kind}")
        for labels, value in samples.items():
            self._lines.append(f"{name}{{{self._join(labels)}}} {value}")

    def gauge(self, name: str, value: float, labels: str = "") -> None:
        self.family(name, "gauge", {labels: value})

    def counter(self, name: str, value: float) -> None:
        self.family(name, "counter", {"": value})

    def histogram(self, name: str, histogram: Histogram) -> None:
        self._lines.append(f"# TYPE {name} histogram")
        total = 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            total += count
            labels = self._join(f'le="{bound}"')
            self._lines.append(f"{name}_bucket{{{labels}}} {total}")
        self._lines.append(f"{name}_sum{{{self.labels}}} {histogram.sum_s}")
        self._lines.append(f"{name}_count{{{self.labels}}} {total}")

    def _join(self, labels: str) -> str:
        return f"{self.labels},{labels}" if labels else self.labels
