"""Counts of rate limits in Redis: one call of one script for all that came in a turn of the event loop.

The script runs as a whole and by the clock of Redis, so that neither replicas nor their clocks can disagree.
One server: the names of the counts hold the number of their window, which only the script knows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.limits import Correction, Part, Verdict
from penstock.ingress.ports import StoreLost

PREFIX = "penstock:limits:"
# What the client raises; the lower half where something answers that is no Redis.
FAILURES = (
    *(RedisError, OSError, TimeoutError, EOFError),
    *(ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError),
)

# ARGV[1], MessagePack: corrections as [name, window, number of the window, delta], claims as lists of
# [name, window, amount, limit]. Answers the clock, then for each claim the first part over its limit
# (-1: none) and the counts. Counts outlive their window by another one, for late corrections.
SCRIPT = """
local time = redis.call('TIME')
local now = tonumber(time[1])
local corrections, claims = unpack(cmsgpack.unpack(ARGV[1]))
local function add(name, seconds, amount)
  local key = KEYS[1] .. name .. ':' .. string.format('%.0f', math.floor(now / seconds))
  local count = redis.call('INCRBY', key, string.format('%.0f', amount))
  if count == amount then redis.call('EXPIRE', key, 2 * seconds) end
  if count < 0 then redis.call('DEL', key) count = 0 end
  return count
end
for _, c in ipairs(corrections) do
  if c[4] > 0 or math.floor(now / c[2]) == c[3] then add(c[1], c[2], c[4]) end
end
local answer = {now, tonumber(time[2])}
for _, parts in ipairs(claims) do
  local over, used = -1, {}
  for i, p in ipairs(parts) do
    used[i] = add(p[1], p[2], p[3])
    if used[i] > p[4] and over < 0 then over = i - 1 end
  end
  if over >= 0 then
    for i, p in ipairs(parts) do used[i] = add(p[1], p[2], -p[3]) end
  end
  answer[#answer + 1] = over
  for i = 1, #used do answer[#answer + 1] = used[i] end
end
return answer
"""


class RedisLimitStore:
    """Fulfils `penstock.ingress.ports.LimitStore`."""

    def __init__(self, settings: LimitSettings) -> None:
        self._timeout_s = settings.limits_redis_timeout
        self._redis: Redis = Redis.from_url(
            settings.limits_redis_url,
            username=settings.limits_redis_username or None,
            password=settings.limits_redis_password.get_secret_value() or None,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            # A command whose answer is lost may have been counted: it is not sent again.
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self._script = self._redis.register_script(SCRIPT)

    async def settle(
        self, claims: Sequence[Sequence[Part]], corrections: Sequence[Correction]
    ) -> list[Verdict]:
        """As of the port."""
        named = [[(part.key, part.window_s, part.amount, part.limit) for part in parts] for parts in claims]
        batch = msgspec.msgpack.encode(([tuple(one) for one in corrections], named))
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                answer: Any = await self._script(keys=[PREFIX], args=[batch])
            _heed_cancellation()
            return _verdicts(claims, [int(number) for number in answer])
        except FAILURES as exc:
            _heed_cancellation()
            raise StoreLost(str(exc)[:256] or type(exc).__name__) from exc

    async def close(self) -> None:
        """As of the port."""
        with contextlib.suppress(*FAILURES):
            await self._redis.aclose()


def _verdicts(claims: Sequence[Sequence[Part]], answer: list[int]) -> list[Verdict]:
    now = answer[0] + answer[1] / 1e6
    verdicts, at = [], 2
    for parts in claims:
        end = at + 1 + len(parts)
        verdicts.append(Verdict(answer[at], tuple(answer[at + 1 : end]), now))
        at = end
    if at != len(answer):
        raise ValueError(f"{len(answer)} numbers in the answer to {len(claims)} claims")
    return verdicts


def _heed_cancellation() -> None:
    """The client writes within `asyncio.wait_for`, which in Python 3.11 loses a cancellation that comes as
    the write ends: its task would never stop."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
