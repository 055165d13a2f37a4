"""Counts of rate limits in Redis: one call of one script for all that came in a turn of the event loop.

The script runs as a whole and by the clock of Redis, so that neither replicas nor their clocks can disagree.
One server: the names of the counts hold the number of their window, which only the script knows.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from hashlib import sha1
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from penstock.ingress.adapters.redis_connection import RedisConnection, RedisRefused, command
from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.limits import TOKENS, Correction, Parts, Verdict, new_tuple
from penstock.ingress.plans import Asked, bounded
from penstock.ingress.ports import Settled, StoreLost

READ_S = 0.005
PREFIX = b"penstock:limits:"
DEFAULT_PORT = 6379

# ARGV[1], MessagePack, one flat list: how many corrections, and name, window, delta as digits, delta, number
# of the window of each; how many claims, and of each how many parts, and name, window, amount as digits,
# amount, limit of each of them: digits are what Redis takes, and would cost it 0.3 us to make. Answers the
# clock, then for each claim the first part over its limit (-1: none) and the counts, in MessagePack too.
# Counts outlive their window by another one, for late corrections.
SCRIPT = """
local call, prefix = redis.call, KEYS[1]
local time = call('TIME')
local now = tonumber(time[1])
local given = cmsgpack.unpack(ARGV[1])
local numbers, lives = {}, {}
local function add(name, seconds, digits, amount)
  local number = numbers[seconds]
  if not number then
    number = string.format(':%.0f', math.floor(now / seconds))
    numbers[seconds], lives[seconds] = number, string.format('%.0f', 2 * seconds)
  end
  local key = prefix .. name .. number
  local count = call('INCRBY', key, digits)
  if count == amount then call('EXPIRE', key, lives[seconds]) end
  if count < 0 then call('DEL', key) count = 0 end
  return count
end
local at = 2
for _ = 1, given[1] do
  local seconds, delta = given[at + 1], given[at + 3]
  if delta > 0 or math.floor(now / seconds) == given[at + 4] then
    add(given[at], seconds, given[at + 2], delta)
  end
  at = at + 5
end
local claims = given[at]
at = at + 1
local answer, last = {now, tonumber(time[2])}, 2
for _ = 1, claims do
  local first, over, verdict = at + 1, -1, last + 1
  local stop = at + 5 * given[at]
  answer[verdict], last = -1, verdict
  for part = first, stop, 5 do
    local count = add(given[part], given[part + 1], given[part + 2], given[part + 3])
    last = last + 1
    answer[last] = count
    if count > given[part + 4] and over < 0 then over = last - verdict - 1 end
  end
  if over >= 0 then
    answer[verdict], last = over, verdict
    for part = first, stop, 5 do
      last = last + 1
      answer[last] = add(given[part], given[part + 1], '-' .. given[part + 2], -given[part + 3])
    end
  end
  at = stop + 1
end
return cmsgpack.pack(answer)
"""


_SCRIPT = SCRIPT.encode()
# Only names the script; nothing depends on its strength.
_DIGEST = sha1(_SCRIPT, usedforsecurity=False).hexdigest().encode()
# A call up to the length of its batch.
_EVALSHA = command(b"EVALSHA", _DIGEST, b"1", PREFIX).replace(b"*4", b"*5", 1) + b"$%d\r\n%b\r\n"
_decode = msgspec.msgpack.Decoder(list[int]).decode


class _Call(NamedTuple):
    """The one that is under way."""

    claims: Sequence[Parts]
    batch: bytes
    settled: Settled
    deadline: float


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
        self._connecting: asyncio.Task[None] | None = None
        self._call: _Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    def settle(self, claims: Sequence[Parts], corrections: Sequence[Correction], settled: Settled) -> None:
        """As of the port. A call whose answer is lost may have been counted: it is not sent again."""
        given: list[object] = [len(corrections)]
        # One by one: to make tuples of them takes twice as long.
        for key, window_s, number, delta in corrections:
            given.append(key)
            given.append(window_s)
            given.append(str(delta))
            given.append(delta)
            given.append(number)
        given.append(len(claims))
        for parts in claims:
            given.append(len(parts))
            if isinstance(parts, Asked):
                # Most: as below.
                kinds, tokens = parts.plan.shape.kinds, parts.tokens
                for index, key in enumerate(parts.plan.keys):
                    what, limit, window_s, _ = kinds[index]
                    amount = bounded(tokens, limit) if what is TOKENS else 1
                    given.append(key)
                    given.append(window_s)
                    given.append(str(amount))
                    given.append(amount)
                    given.append(limit)
                continue
            for key, window_s, amount, limit, _, _ in parts:
                given.append(key)
                given.append(window_s)
                given.append(str(amount))
                given.append(amount)
                given.append(limit)
        loop = asyncio.get_running_loop()
        self._call = _Call(claims, msgspec.msgpack.encode(given), settled, loop.time() + self._timeout_s)
        if self._timer is None:
            self._timer = loop.call_at(self._call.deadline, self._look)
        if self._connection is None or self._connection.lost:
            self._connecting = asyncio.create_task(self._connect(self._call), name="limits-redis")
        else:
            self._connection.ask(_EVALSHA % (len(self._call.batch), self._call.batch), self._answered)

    async def close(self) -> None:
        """As of the port."""
        self._call = None
        self._drop()
        if self._timer is not None:
            self._timer.cancel()

    async def _connect(self, call: _Call) -> None:
        try:
            connection = await RedisConnection.connect(self._host, self._port, self._tls, self._greetings)
        except (OSError, RedisRefused) as exc:
            if self._call is call:
                self._lost(str(exc) or type(exc).__name__)
            return
        self._connection = connection
        connection.ask(_EVALSHA % (len(call.batch), call.batch), self._answered)

    def _answered(self, said: bytes | Exception) -> None:
        call, connection = self._call, self._connection
        if call is None or connection is None:
            return
        if isinstance(said, RedisRefused) and str(said).startswith("NOSCRIPT"):
            # Not run, and not counted.
            connection.ask(command(b"EVAL", _SCRIPT, b"1", PREFIX, call.batch), self._answered)
        elif isinstance(said, Exception):
            self._lost(str(said) or type(said).__name__)
        else:
            try:
                verdicts = _verdicts(call.claims, _decode(said))
            except (msgspec.MsgspecError, LookupError, ValueError) as exc:
                self._lost(str(exc))
            else:
                self._call = None
                call.settled(verdicts)

    def _look(self, late: _Call | None = None) -> None:
        """Whether the call is late: one timer for all calls, since next to none lives to see it. An answer to
        one that is (`late`) may have come that this process had no time to read: it is read first."""
        self._timer, call = None, self._call
        loop = asyncio.get_running_loop()
        if call is None:
            return
        if call is late:
            self._lost(f"no answer within {self._timeout_s:g} s")
        elif loop.time() < call.deadline:
            self._timer = loop.call_at(call.deadline, self._look)
        else:
            self._timer = loop.call_later(READ_S, self._look, call)

    def _lost(self, cause: str) -> None:
        call, self._call = self._call, None
        # The answer, which would be taken for that to the next call, may still come.
        self._drop()
        if call is not None:
            call.settled(StoreLost(cause[:256]))

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._connecting is not None:
            self._connecting.cancel()


def _verdicts(claims: Sequence[Parts], answer: list[int]) -> list[Verdict]:
    now = answer[0] + answer[1] / 1e6
    verdicts, at = [], 2
    for parts in claims:
        end = at + 1 + len(parts)
        used = (answer[at + 1], answer[at + 2]) if end == at + 3 else tuple(answer[at + 1 : end])
        verdicts.append(new_tuple(Verdict, (answer[at], used, now)))
        at = end
    if at != len(answer):
        raise ValueError(f"{len(answer)} numbers in the answer to {len(claims)} claims")
    return verdicts
