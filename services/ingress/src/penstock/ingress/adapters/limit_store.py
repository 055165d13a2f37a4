"""Counts of rate limits in Redis: one call of one script for all that came in a turn of the event loop.

The script runs as a whole and by the clock of Redis, so that neither replicas nor their clocks can disagree.
One server: the names of the counts hold the number of their window, which only the script knows.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from hashlib import sha1
from urllib.parse import unquote, urlsplit

import msgspec

from penstock.ingress.adapters.redis_connection import RedisConnection, RedisRefused, command
from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.limits import Correction, Part, Verdict
from penstock.ingress.ports import StoreLost

PREFIX = b"penstock:limits:"
DEFAULT_PORT = 6379

# ARGV[1], MessagePack: corrections as [name, window, number of the window, delta], claims as lists of
# [name, window, amount, limit]. Answers the clock, then for each claim the first part over its limit
# (-1: none) and the counts, in MessagePack too. Counts outlive their window by another one, for late
# corrections.
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
return cmsgpack.pack(answer)
"""


_SCRIPT = SCRIPT.encode()
# Only names the script; nothing depends on its strength.
_DIGEST = sha1(_SCRIPT, usedforsecurity=False).hexdigest().encode()
_decode = msgspec.msgpack.Decoder(list[int]).decode


class RedisLimitStore:
    """Fulfils `penstock.ingress.ports.LimitStore`."""

    def __init__(self, settings: LimitSettings) -> None:
        self._timeout_s = settings.limits_redis_timeout
        url = urlsplit(settings.limits_redis_url)
        self._host, self._port = unquote(url.hostname or ""), url.port or DEFAULT_PORT
        self._tls = ssl.create_default_context() if url.scheme == "rediss" else None
        self._greetings: list[list[bytes]] = []
        user, password = settings.limits_redis_username, settings.limits_redis_password.get_secret_value()
        if user or password:
            # Without a name it is the default user's, as before Redis 6.
            words = [b"AUTH", *([user.encode()] if user else []), password.encode()]
            self._greetings.append(words)
        if database := url.path.removeprefix("/"):
            self._greetings.append([b"SELECT", database.encode()])
        self._connection: RedisConnection | None = None

    async def settle(
        self, claims: Sequence[Sequence[Part]], corrections: Sequence[Correction]
    ) -> list[Verdict]:
        """As of the port. A call whose answer is lost may have been counted: it is not sent again."""
        named = [[(part.key, part.window_s, part.amount, part.limit) for part in parts] for parts in claims]
        batch = msgspec.msgpack.encode(([tuple(one) for one in corrections], named))
        try:
            async with asyncio.timeout(self._timeout_s):
                return _verdicts(claims, _decode(await self._run(batch)))
        except TimeoutError:
            self._drop()
            raise StoreLost(f"no answer within {self._timeout_s:g} s") from None
        except (OSError, RedisRefused, msgspec.MsgspecError, LookupError, ValueError) as exc:
            self._drop()
            raise StoreLost(str(exc)[:256] or type(exc).__name__) from exc
        except asyncio.CancelledError:
            # The answer, which would be taken for that to the next call, may still come.
            self._drop()
            raise

    async def close(self) -> None:
        """As of the port."""
        self._drop()

    async def _run(self, batch: bytes) -> bytes:
        connection = self._connection
        if connection is None or connection.lost:
            connection = self._connection = await RedisConnection.connect(
                self._host, self._port, self._tls, self._greetings
            )
        try:
            return await connection.ask(command(b"EVALSHA", _DIGEST, b"1", PREFIX, batch))
        except RedisRefused as exc:
            # Not run, and not counted.
            if not str(exc).startswith("NOSCRIPT"):
                raise
        return await connection.ask(command(b"EVAL", _SCRIPT, b"1", PREFIX, batch))

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


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
