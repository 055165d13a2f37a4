"""Rate limits: what a request adds to which counts, fixed windows, what it has spent in the end.

Every count belongs to a window of the clock (window n of s seconds covers n*s up to (n+1)*s). A request is
added to all of its counts first and taken back if one of them is over its limit then, so that no two
requests can both take the last place. Tokens are added by estimate and corrected by what was used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from penstock.ingress.failures import GatewayError
from penstock.ingress.limit_settings import Limits, UserRecord

MINUTE_S, SECOND_S = 60, 1
REQUESTS, TOKENS = "requests", "tokens"
# Where a request names no bound for its answer, so many tokens are held for it until it ends.
OUTPUT_TOKENS = 256
MAX_KEYS = 200_000
# Counted together beyond MAX_KEYS: a flood of made-up names gets one allowance, and costs no memory.
OVERFLOW = "*"
_HEADER_LINES = (
    "x-ratelimit-limit-{0}: {1}\r\nx-ratelimit-remaining-{0}: {2}\r\nx-ratelimit-reset-{0}: {3}\r\n"
)


class Part(NamedTuple):
    """One count that a request adds `amount` to, and which may not be above `limit` then."""

    key: str
    window_s: int
    amount: int
    limit: int
    what: str
    # Whose limit it is, for people.
    whose: str


class Verdict(NamedTuple):
    """What a store says of a claim: the first part over its limit (-1: none, it is granted), each count
    as it is now, and the store's clock in seconds since 1970."""

    over: int
    used: tuple[int, ...]
    now: float


class Correction(NamedTuple):
    """`delta` for a count that was added to in window `number`. A later window gets what was added too
    little, so that a long answer is not free, and keeps what was added too much in an earlier one."""

    key: str
    window_s: int
    number: int
    delta: int


class Counts(Protocol):
    """Where corrections go: the store that granted."""

    def correct(self, corrections: Iterable[Correction]) -> None:
        """Take them, now or soon."""


class Reservation:
    """A granted claim. `hide_usage`: the gateway asked for the usage chunk, its client did not."""

    __slots__ = ("_counts", "_parts", "headers", "hide_usage", "now")

    def __init__(self, parts: Sequence[Part], verdict: Verdict, counts: Counts) -> None:
        self._parts, self._counts = parts, counts
        self.now = verdict.now
        self.headers = rate_headers(parts, verdict).encode()
        self.hide_usage = False

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit of tokens applies."""
        return any(part.what is TOKENS for part in self._parts)

    def settle(self, tokens: int | None) -> None:
        """Correct the estimate, once; what counts requests stays. None: the estimate stands."""
        parts, self._parts = self._parts, ()
        if tokens is None:
            return
        corrections = [
            Correction(part.key, part.window_s, window(self.now, part.window_s), tokens - part.amount)
            for part in parts
            if part.what is TOKENS and tokens != part.amount
        ]
        if corrections:
            self._counts.correct(corrections)


class LocalCounts:
    """Counts of one process."""

    def __init__(self, most_keys: int = MAX_KEYS) -> None:
        self._most = most_keys
        # By length of the window: its number and its counts. The past is forgotten whole.
        self._windows: dict[int, tuple[int, dict[str, int]]] = {}

    def claim(self, parts: Sequence[Part], now: float) -> Verdict:
        """Add to all counts, or to none."""
        over, used, places = -1, [], []
        for part in parts:
            counts = self._counts(part.window_s, window(now, part.window_s))
            key = part.key if part.key in counts or len(counts) < self._most else OVERFLOW
            counts[key] = count = counts.get(key, 0) + part.amount
            used.append(count)
            places.append((counts, key))
            if count > part.limit and over < 0:
                over = len(used) - 1
        if over >= 0:
            for number, (part, (counts, key)) in enumerate(zip(parts, places, strict=True)):
                counts[key] -= part.amount
                used[number] -= part.amount
        return Verdict(over, tuple(used), now)

    def correct(self, corrections: Iterable[Correction], now: float) -> None:
        """Apply corrections."""
        for key, window_s, number, delta in corrections:
            current = window(now, window_s)
            counts = self._counts(window_s, current)
            if number == current or delta > 0:
                key = key if key in counts or len(counts) < self._most else OVERFLOW
                counts[key] = max(0, counts.get(key, 0) + delta)

    def _counts(self, window_s: int, number: int) -> dict[str, int]:
        held = self._windows.get(window_s)
        if held is None or held[0] != number:
            held = self._windows[window_s] = number, {}
        return held[1]


class Allowances:
    """Who may ask how much: the defaults, and users' records."""

    def __init__(self, default: Limits) -> None:
        self._default = default
        self._records: dict[str, UserRecord] = {}

    @property
    def active(self) -> bool:
        """Whether anybody is limited."""
        return bool(self._records or self._default.rpm or self._default.tpm)

    def put(self, user: str, record: UserRecord | None) -> None:
        """A user's record; None: there is none any more."""
        if record is None:
            self._records.pop(user, None)
        else:
            self._records[user] = record

    def parts(self, user: str, model: str, tokens: int) -> list[Part]:
        """What a request of `user` for `model` with an estimate of `tokens` adds to; empty: no limit."""
        record, default = self._records.get(user), self._default
        if record is None:
            return _parts(f"{len(user)}:{user}", "user", default.rpm, default.tpm, tokens)
        rpm = default.rpm if record.rpm is None else record.rpm
        tpm = default.tpm if record.tpm is None else record.tpm
        parts = _parts(f"{len(user)}:{user}", "user", rpm, tpm, tokens)
        limits = record.models.get(model)
        if limits is not None:
            # The length keeps a user and a model apart from a user with a longer name.
            key = f"{len(user)}:{user}:{model}"
            parts += _parts(key, "user for this model", limits.rpm, limits.tpm, tokens)
        return parts


def _parts(key: str, whose: str, rpm: int, tpm: int, tokens: int) -> list[Part]:
    parts = []
    if rpm:
        parts.append(Part(f"{key}|r", MINUTE_S, 1, rpm, REQUESTS, whose))
    if tpm:
        # Of more than the limit the whole limit is held: in an empty window any request passes.
        parts.append(Part(f"{key}|t", MINUTE_S, max(1, min(tokens, tpm)), tpm, TOKENS, whose))
    return parts


def estimate(prompt_tokens: int, max_tokens: int, *, generates: bool) -> int:
    """Tokens to hold for a request."""
    return prompt_tokens + ((max_tokens or OUTPUT_TOKENS) if generates else 0)


def window(now: float, window_s: int) -> int:
    """Number of the window that a moment lies in."""
    return int(now // window_s)


def left_s(now: float, window_s: int) -> int:
    """Whole seconds after which the window is over, 1 or more."""
    return max(1, math.ceil((window(now, window_s) + 1) * window_s - now))


def rate_headers(parts: Sequence[Part], verdict: Verdict) -> str:
    """The `x-ratelimit-*` lines, as OpenAI's; of several limits of one kind, the one with the least left."""
    tightest: dict[str, tuple[int, Part]] = {}
    for part, used in zip(parts, verdict.used, strict=True):
        left = max(0, part.limit - used)
        if part.what not in tightest or left < tightest[part.what][0]:
            tightest[part.what] = left, part
    return "".join(
        _HEADER_LINES.format(what, part.limit, left, _duration(left_s(verdict.now, part.window_s)))
        for what, (left, part) in tightest.items()
    )


def refusal(parts: Sequence[Part], verdict: Verdict) -> GatewayError:
    """The answer to a claim that is over."""
    part = parts[verdict.over]
    per_second = part.window_s == SECOND_S
    flag = "tpm" if part.what is TOKENS else "model-rps" if per_second else "rpm"
    asks = f"; this request needs {part.amount}" if part.what is TOKENS else ""
    text = (
        f"the {part.whose} is over its limit of {part.limit} {part.what} per "
        f"{'second' if per_second else 'minute'}, {verdict.used[verdict.over]} are counted{asks}"
    )
    wait_s = left_s(verdict.now, part.window_s)
    lines = f"x-error-{flag}-exceeded: true\r\n{rate_headers(parts, verdict)}"
    return GatewayError("rate_limit_exceeded", text, retry_after_s=wait_s, lines=lines)


def _duration(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
