"""An engine's Prometheus text, reduced to its load. Names are those of vLLM and SGLang."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from penstock.common.model import EngineLoad

RUNNING = (b"vllm:num_requests_running", b"sglang:num_running_reqs")
WAITING = (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs")
KV_USAGE = (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc", b"sglang:token_usage")
# vLLM's NIXL connector; prometheus_client adds the ending in newer releases.
KV_EXPIRED = (b"vllm:nixl_num_kv_expired_reqs_total", b"vllm:nixl_num_kv_expired_reqs")
CACHE_CONFIG = (b"vllm:cache_config_info",)

# What an engine says is bounded: longer lines, more lines of one name and larger values are not load.
MAX_LINE_BYTES = 16 * 1024
MAX_HITS = 4096
MAX_VALUE = 1e9

_SAMPLE = re.compile(rb'(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*+")*+)\})?[ \t]+([^ \t]+)(?:[ \t]+-?[0-9]+)?[ \t\r]*')
_BLOCK_SIZE = re.compile(rb'(?:^|,)[ ]*block_size="([0-9]{1,9})"')
_BLOCKS = re.compile(rb'(?:^|,)[ ]*num_gpu_blocks="([0-9]{1,9})"')

# Engine kinds by the prefix of their metrics and by what they say in `owned_by`.
PREFIXES = {b"vllm:": "vllm", b"sglang:": "sglang", b"trtllm_": "tensorrt-llm", b"llamacpp:": "llama.cpp"}
OWNERS = {
    "vllm": "vllm",
    "sglang": "sglang",
    "tensorrt_llm": "tensorrt-llm",
    "tensorrt-llm": "tensorrt-llm",
    "llamacpp": "llama.cpp",
    "lmdeploy": "lmdeploy",
}


def engine_of_owner(owner: str) -> str:
    """The engine kind that an `owned_by` stands for; empty if it names somebody else."""
    return OWNERS.get(owner.lower(), "")


def engine_of_metrics(text: bytes) -> str:
    """The engine kind whose metrics these are; empty if unknown."""
    return next((kind for prefix, kind in PREFIXES.items() if _has(text, prefix)), "")


def _has(text: bytes, prefix: bytes) -> bool:
    return text.startswith(prefix) or b"\n" + prefix in text


@cache
def _of(prefix: bytes, names: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return tuple(name for name in names if name.startswith(prefix))


def parse_engine_load(text: bytes) -> EngineLoad:
    """Requests and blocks are summed over the engines behind one address, KV usage is the highest.

    Only wanted lines are looked at: 200 KB take well under a millisecond. What is absent, unreadable,
    negative or not finite stays None; KV usage above 1 counts as 1.
    """
    # One address, one engine: what is looked for in the text of another would be searched to its end.
    prefix = next((prefix for prefix in PREFIXES if _has(text, prefix)), b"-")
    usage = _values(text, _of(prefix, KV_USAGE))
    configs = [labels for name in _of(prefix, CACHE_CONFIG) for labels, _ in _samples(text, name)]
    block_sizes, blocks = _label(_BLOCK_SIZE, configs), _label(_BLOCKS, configs)
    return EngineLoad(
        running=_total(_values(text, _of(prefix, RUNNING))),
        waiting=_total(_values(text, _of(prefix, WAITING))),
        kv_usage_ratio=min(max(usage), 1.0) if usage else None,
        kv_blocks=_total(blocks),
        block_size=max(block_sizes, default=None),
        kv_expired=_total(_values(text, _of(prefix, KV_EXPIRED))),
    )


def absurd_figures(text: bytes) -> list[str]:
    """The names of those figures of load that are there with a value that is none: negative, not finite, no
    number, or beyond MAX_VALUE."""
    prefix = next((prefix for prefix in PREFIXES if _has(text, prefix)), b"-")
    names = (name for names in (RUNNING, WAITING, KV_USAGE) for name in _of(prefix, names))
    return [name.decode() for name in names if any(_number(raw) is None for _, raw in _samples(text, name))]


def _total(values: list[float] | list[int]) -> int | None:
    return int(sum(values)) if values else None


def _label(pattern: re.Pattern[bytes], configs: list[bytes]) -> list[int]:
    return [int(found[1]) for labels in configs if (found := pattern.search(labels))]


def _values(text: bytes, names: tuple[bytes, ...]) -> list[float]:
    numbers = (_number(raw) for name in names for _, raw in _samples(text, name))
    return [number for number in numbers if number is not None]


def _number(raw: bytes) -> float | None:
    try:
        value = float(raw)
    except ValueError:
        return None
    return value if 0 <= value <= MAX_VALUE else None


def _samples(text: bytes, name: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(labels, value) of every line of this name."""
    at = 0
    for _ in range(MAX_HITS):
        at = text.find(name, at)
        if at < 0:
            return
        end = text.find(b"\n", at)
        end = len(text) if end < 0 else end
        if (at == 0 or text[at - 1 : at] == b"\n") and end - at <= MAX_LINE_BYTES:
            sample = _SAMPLE.fullmatch(text, at + len(name), end)
            if sample:
                yield sample[1] or b"", sample[2]
        at = end
