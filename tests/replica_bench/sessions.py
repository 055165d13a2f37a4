"""Clients that hold conversations, and where their turns went. Every answer is compared with the right one"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
from integration.stack import MODEL

from penstock.sim.text import expected_text

TURNS, MAX_TOKENS = 6, 24
# Bytes of a system prompt, which a sixteenth of the sessions shares, and of what a user says at a time.
SYSTEM_BYTES, TURN_BYTES = 1500, 1000
# Seconds that a user thinks.
THINKING_S = 0.1, 0.6
# An engine holds whole blocks, and the end of a conversation's JSON differs from turn to turn.
HELD_RATIO = 0.9


@dataclass
class Tally:
    """Of follow-up turns: how many there were, on the instance of the turn before, where that one was still
    there, and with the conversation cached as that engine reported; and what else happened."""

    follow_ups: int = 0
    possible: int = 0
    returned: int = 0
    cached: int = 0
    local: int = 0
    requests: int = 0
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def line(self, name: str) -> str:
        """One line of figures."""
        ordered = sorted(self.seconds) or [0.0]
        p50, p99 = (ordered[int(len(ordered) * q)] * 1000 for q in (0.5, 0.99))
        failed = ", ".join(f"{count} {what}" for what, count in self.failures.items()) or "0"
        return (
            f"{name:34} {self.requests:8} {self.follow_ups:10} {_share(self.returned, self.possible):>11}"
            f" {_share(self.cached, self.possible):>9} {_share(self.local, self.requests):>7}"
            f" {p50:8.1f} {p99:8.1f}  {failed}"
        )


HEAD = (
    f"{'':34} {'requests':>8} {'follow-ups':>10} {'on holder %':>11} {'cached %':>9} {'local %':>7}"
    f" {'p50 ms':>8} {'p99 ms':>8}  failed"
)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


class Sessions:
    """`count` users at a time, each one conversation after the other, until told to stop."""

    def __init__(self, url: str, count: int, seed: int = 1) -> None:
        self._url, self._count, self._random = url, count, Random(seed)
        self._stop = asyncio.Event()
        # Instances that were killed: nobody can go back to them.
        self.gone: set[str] = set()
        self.tally = Tally()

    async def run(self, seconds: float) -> None:
        """Let the users talk for so long, and finish the turn in hand."""
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as users:
            for number in range(self._count):
                users.create_task(self._user(session, number), name=f"user {number}")
            await asyncio.sleep(seconds)
            self._stop.set()

    async def _user(self, session: aiohttp.ClientSession, number: int) -> None:
        conversation = 0
        while not self._stop.is_set():
            conversation += 1
            await self._converse(session, f"{number}.{conversation}")

    async def _converse(self, session: aiohttp.ClientSession, name: str) -> None:
        system = f"system {self._random.randrange(self._count // 4)} ".ljust(SYSTEM_BYTES, "s")
        messages: list[dict[str, str]] = [{"role": "system", "content": system}]
        before, held = "", 0
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"{name} turn {turn} ".ljust(TURN_BYTES, "u")})
            answer = await self._ask(session, messages)
            if answer is None:
                return
            text, instance, cached, prompt_tokens = answer
            if before:
                self.tally.follow_ups += 1
                if before not in self.gone:
                    self.tally.possible += 1
                    self.tally.returned += instance == before
                    self.tally.cached += cached >= HELD_RATIO * held
            before, held = instance, prompt_tokens
            messages.append({"role": "assistant", "content": text})
            try:
                async with asyncio.timeout(self._random.uniform(*THINKING_S)):
                    await self._stop.wait()
                return
            except TimeoutError:
                pass

    async def _ask(
        self, session: aiohttp.ClientSession, messages: list[dict[str, str]]
    ) -> tuple[str, str, int, int] | None:
        """(answer, instance, cached tokens, prompt tokens); None if the request failed."""
        body = {"model": MODEL, "messages": messages, "max_tokens": MAX_TOKENS}
        started = time.monotonic()
        self.tally.requests += 1
        try:
            async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                answer: dict[str, Any] = json.loads(await response.read())
                headers, status = response.headers, response.status
        except aiohttp.ClientError as exc:
            self.tally.failures[type(exc).__name__] += 1
            return None
        self.tally.seconds.append(time.monotonic() - started)
        if status != 200:
            self.tally.failures[str(answer["error"]["code"])] += 1
            return None
        text = str(answer["choices"][0]["message"]["content"])
        if text != expected_text(messages, model=MODEL, max_tokens=MAX_TOKENS):
            self.tally.failures["wrong answer"] += 1
            return None
        self.tally.local += headers["routing-strategy"] == "local"
        usage = answer["usage"]
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return text, headers["target-pod"], cached, usage["prompt_tokens"]
