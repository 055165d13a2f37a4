"""What the gateway adds to a divided request, by protocol and mode: real processes, one request at a time.

Times are the ingress's own, from its log; CPU is the kernel's account, of ingress and scheduler.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from integration.pd_stack import CONNECTORS, PdStack, pd_stack
from integration.servers import eventually

PROMPT = "What does the gateway add to this request? " * 48
WARM_UP = 20
# Both requests leave at once, or decode's alone: prefill's time is within that of decode.
AT_ONCE = (("sglang", "batched"), ("kvt", "batched"))

HEAD = (
    f"{'protocol, mode':34} {'placed ms':>9} {'p99':>6} {'between':>8} {'p99':>6} {'added ms':>9} {'p99':>6}"
    f" {'ingress us':>10} {'sched us':>9}"
)


async def measure(requests: int) -> None:
    """Print a row for each protocol and mode, after one of requests that go to one instance."""
    with (
        tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder,
        pd_stack(Path(folder), schedulers=1, sims=2) as pd,
    ):
        async with aiohttp.ClientSession() as session:
            await pd.ready(session)
            await eventually(lambda: _scheduled(session, pd.urls["batched"]), 30.0)
            print(f"live, {requests} streamed requests each, prompt of {len(PROMPT):,} bytes")
            print(HEAD)
            print(await _row(pd, session, "nixl", "batched", requests, divided=False), flush=True)
            for model in CONNECTORS:
                for mode in pd.urls:
                    if (model, mode) != ("sglang", "staged"):
                        print(await _row(pd, session, model, mode, requests), flush=True)
            await pd.settled(session)


async def _scheduled(session: aiohttp.ClientSession, url: str) -> bool:
    return (await _ask(session, url, "nixl", 0)) != "local"


async def _ask(
    session: aiohttp.ClientSession, url: str, model: str, number: int, *, divided: bool = True
) -> str:
    """The policy that decided."""
    messages = [{"role": "user", "content": f"{number} {PROMPT}"}]
    body = {"model": model, "messages": messages, "max_tokens": 4, "stream": True}
    headers = {"routing-strategy": "pd"} if divided else {}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        text = await response.text()
        if response.status != 200 or "[DONE]" not in text:
            raise AssertionError(f"{response.status}: {text[:300]}")
        return response.headers["routing-strategy"]


async def _row(
    pd: PdStack, session: aiohttp.ClientSession, model: str, mode: str, requests: int, *, divided: bool = True
) -> str:
    url, (ingress,) = pd.urls[mode], [one for one in pd.stack.ingresses if one.url == pd.urls[mode]]
    for number in range(WARM_UP):
        await _ask(session, url, model, -number, divided=divided)
    # What the warm-up left to be told and published is not to count below.
    await asyncio.sleep(0.3)
    pids = ingress.process.pid, pd.stack.schedulers[0].pid
    start, before_s = len(ingress.process.lines), [_cpu_s(pid) for pid in pids]
    for number in range(requests):
        await _ask(session, url, model, number, divided=divided)
    spent_s = [_cpu_s(pid) - before for pid, before in zip(pids, before_s, strict=True)]
    cpu_us = [one / requests * 1e6 for one in spent_s]
    found: list[dict[str, Any]] = []

    def all_there() -> bool:
        found[:] = _outcomes(ingress.process.lines[start:])
        return len(found) >= requests

    await eventually(all_there)
    name = f"{model}, {mode}" if divided else "undivided"
    return _told(name, found, (model, mode) in AT_ONCE, cpu_us, divided=divided)


def _outcomes(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if '"message":"request"' in line:
            yield json.loads(line)


def _told(
    name: str, outcomes: list[dict[str, Any]], at_once: bool, cpu_us: list[float], *, divided: bool
) -> str:
    placed = [one.get("scheduling_ms", 0.0) for one in outcomes]
    between = [one.get("transfer_wait_ms", 0.0) for one in outcomes]
    added = [
        one["ttft_ms"] - one.get("decode_ttft_ms", 0.0) - (0.0 if at_once else one.get("prefill_ms", 0.0))
        for one in outcomes
    ]
    if divided and not all(one.get("prefill_instance") for one in outcomes):
        raise AssertionError("not every request was divided")
    cells = [_pair(placed, 9), _pair(between, 8), _pair(added, 9) if divided else f"{'-':>9} {'-':>6}"]
    return f"{name:34} {' '.join(cells)} {cpu_us[0]:>10.0f} {cpu_us[1]:>9.0f}"


def _pair(values: list[float], width: int) -> str:
    p50, p99 = np.percentile(values, (50, 99))
    return f"{p50:>{width}.2f} {p99:>6.2f}"


def _cpu_s(pid: int) -> float:
    """Of a process and its workers."""
    process = psutil.Process(pid)
    return float(sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True))))
