"""Rate limits: what a request adds to which counts, fixed windows, what it has spent in the end.

Every count belongs to a window of the clock (window n of s seconds covers n*s up to (n+1)*s). A request is
added to all of its counts first and taken back if one of them is over its limit then, so that no two
requests can both take the last place. Tokens are added by estimate and corrected by what was used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from penstock.ingress.failures import GatewayError
from penstock.ingress.limit_settings import Limits, UserRecord

MINUTE_S, SECOND_S = 60, 1
REQUESTS, TOKENS = "requests", "tokens"
# Held for the answer of a request that names no bound for it.
OUTPUT_TOKENS = 256
MAX_KEYS = 200_000
# Counted together beyond MAX_KEYS: a flood of made-up names gets one allowance, and costs no memory.
OVERFLOW = "*"
MAX_PLANS = 8192


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


class Held(Protocol):
    """What a request holds of its limits. `headers`: the lines that tell its client; `counts_tokens`: a limit
    of tokens applies; `hide_usage`: the gateway asked for the usage chunk, its client did not."""

    headers: bytes
    counts_tokens: bool
    hide_usage: bool

    def settle(self, tokens: int | None) -> None:
        """Correct the estimate, once; what counts requests stays. None: the estimate stands."""


class Reservation:
    """A claim that a store granted. Fulfils `Held`."""

    __slots__ = ("_counts", "_parts", "counts_tokens", "headers", "hide_usage", "now")

    def __init__(self, parts: Sequence[Part], verdict: Verdict, counts: Counts) -> None:
        self._parts, self._counts = parts, counts
        self.now = verdict.now
        self.headers = rate_headers(parts, verdict)
        self.hide_usage = self.counts_tokens = False
        for part in parts:
            if part.what is TOKENS:
                self.counts_tokens = True

    def settle(self, tokens: int | None) -> None:
        """As of `Held`."""
        parts, self._parts = self._parts, ()
        if tokens is None or not self.counts_tokens:
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


class Plan:
    """The counts that requests of one user for one model add to. `counts`: there are any; `several`: more
    than one of a kind.

    `leases` are the first and the last of their leases, which `leased_from` a moment until another are good,
    and `lines` the header lines for their numbers: the notes of `penstock.ingress.leases`."""

    __slots__ = (
        "_parts",
        "counts",
        "counts_tokens",
        "leased_from",
        "leased_until",
        "leases",
        "lines",
        "several",
    )

    def __init__(self, parts: Sequence[Part]) -> None:
        """What a request adds to `parts` is 1, or its tokens."""
        self._parts = tuple(parts)
        self.counts_tokens = any(part.what is TOKENS for part in parts)
        self.several = len({part.what for part in parts}) < len(parts)
        self.counts = bool(parts)
        self.leases: Any = None
        self.leased_from = self.leased_until = 0
        self.lines = b""

    def parts(self, tokens: int) -> list[Part]:
        """What a request with an estimate of `tokens` adds."""
        # Of more than the limit the whole limit is held: in an empty window any request passes.
        return [
            part
            if part.what is REQUESTS
            else Part(
                part.key, part.window_s, max(1, min(tokens, part.limit)), part.limit, TOKENS, part.whose
            )
            for part in self._parts
        ]


class Allowances:
    """Who may ask how much: the defaults, and users' records. `plans` are those that `plan` made last."""

    def __init__(self, default: Limits) -> None:
        self._default = default
        self._records: dict[str, UserRecord] = {}
        self.plans: dict[tuple[str, str, Part | None], Plan] = {}

    @property
    def active(self) -> bool:
        """Whether anybody is limited."""
        return bool(self._records or self._default.rpm or self._default.tpm)

    def put(self, user: str, record: UserRecord | None) -> None:
        """A user's record; None: there is none any more."""
        self.plans.clear()
        if record is None:
            self._records.pop(user, None)
        else:
            self._records[user] = record

    def plan(self, user: str, model: str, rate: Part | None = None) -> Plan:
        """What requests of `user` (empty: nobody) for `model` add to, `rate` included; empty: no limit."""
        key = user, model, rate
        plan = self.plans.get(key)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            parts = self._parts(user, model) if user else []
            plan = self.plans[key] = Plan(parts if rate is None else [*parts, rate])
        return plan

    def parts(self, user: str, model: str, tokens: int) -> list[Part]:
        """What a request of `user` for `model` with an estimate of `tokens` adds."""
        return self.plan(user, model).parts(tokens)

    def _parts(self, user: str, model: str) -> list[Part]:
        record, default = self._records.get(user), self._default
        if record is None:
            return _parts(f"{len(user)}:{user}", "user", default.rpm, default.tpm)
        rpm = default.rpm if record.rpm is None else record.rpm
        tpm = default.tpm if record.tpm is None else record.tpm
        parts = _parts(f"{len(user)}:{user}", "user", rpm, tpm)
        limits = record.models.get(model)
        if limits is not None:
            # The length keeps a user and a model apart from a user with a longer name.
            key = f"{len(user)}:{user}:{model}"
            parts += _parts(key, "user for this model", limits.rpm, limits.tpm)
        return parts


def _parts(key: str, whose: str, rpm: int, tpm: int) -> list[Part]:
    parts = []
    if rpm:
        parts.append(Part(f"{key}|r", MINUTE_S, 1, rpm, REQUESTS, whose))
    if tpm:
        parts.append(Part(f"{key}|t", MINUTE_S, 1, tpm, TOKENS, whose))
    return parts


def window(now: float, window_s: int) -> int:
    """Number of the window that a moment lies in."""
    return int(now // window_s)


def left_s(now: float, window_s: int) -> int:
    """Whole seconds after which the window is over, 1 or more."""
    return max(1, math.ceil((window(now, window_s) + 1) * window_s - now))


def rate_headers(parts: Sequence[Part], verdict: Verdict) -> bytes:
    """The `x-ratelimit-*` lines, as OpenAI's; of several limits of one kind, the one with the least left."""
    tightest: dict[str, tuple[int, Part]] = {}
    for part, used in zip(parts, verdict.used, strict=True):
        left = part.limit - used
        if part.what not in tightest or left < tightest[part.what][0]:
            tightest[part.what] = left, part
    return b"".join(
        b"%b%d%b"
        % (
            lines_before(part.what, part.limit),
            max(0, left),
            lines_after(part.what, left_s(verdict.now, part.window_s)),
        )
        for left, part in tightest.values()
    )


@lru_cache(4096)
def lines_before(what: str, limit: int) -> bytes:
    """The header lines of a limit up to what is left of it."""
    return f"x-ratelimit-limit-{what}: {limit}\r\nx-ratelimit-remaining-{what}: ".encode()


@lru_cache(1024)
def lines_after(what: str, seconds: int) -> bytes:
    """The header lines of a limit after what is left of it; all of it is there again after `seconds`."""
    return f"\r\nx-ratelimit-reset-{what}: {_duration(seconds)}\r\n".encode()


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
    lines = f"x-error-{flag}-exceeded: true\r\n{rate_headers(parts, verdict).decode()}"
    return GatewayError("rate_limit_exceeded", text, retry_after_s=wait_s, lines=lines)


def _duration(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
