"""Rate limits: what a request adds to which counts, fixed windows, what it has spent in the end.

Every count belongs to a window of the clock (window n of s seconds covers n*s up to (n+1)*s). A request is
added to all of its counts first and taken back if one of them is over its limit then, so that no two
requests can both take the last place. Tokens are added by estimate and corrected by what was used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from penstock.common.messages import Placement, Rejection
from penstock.common.model import Instance
from penstock.ingress.failures import GatewayError

MINUTE_S, SECOND_S = 60, 1
REQUESTS, TOKENS = "requests", "tokens"
# Held for the answer of a request that names no bound for it.
OUTPUT_TOKENS = 256
MAX_KEYS = 200_000
# Counted together beyond MAX_KEYS: a flood of made-up names gets one allowance, and costs no memory.
OVERFLOW = "*"


class Part(NamedTuple):
    """One count that a request adds `amount` to, and which may not be above `limit` then."""

    key: str
    window_s: int
    amount: int
    limit: int
    what: str
    # Whose limit it is, for people.
    whose: str


# Makes a named tuple without its constructor, which costs twice as much.
new_tuple: Final = tuple.__new__


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


class Parts(Protocol):
    """What one claim adds to: a list, or what is one as soon as somebody looks."""

    def __len__(self) -> int:
        """How many."""

    def __iter__(self) -> Iterator[Part]:
        """One after the other."""


class Counts(Protocol):
    """Where corrections go: the store that granted."""

    def correct(self, corrections: Iterable[Correction]) -> None:
        """Take them, now or soon."""


class Held:
    """What a request holds of its limits. `headers`: the lines that tell its client; `counts_tokens`: a limit
    of tokens applies; `hide_usage`: the gateway asked for the usage chunk, its client did not; `pending`: it
    is not known yet whether it may have it."""

    __slots__ = ("counts_tokens", "headers", "hide_usage", "pending")

    def __init__(self, headers: bytes, counts_tokens: bool) -> None:
        self.headers, self.counts_tokens = headers, counts_tokens
        self.hide_usage = self.pending = False

    def settle(self, tokens: int | None) -> None:
        """Correct the estimate, once; what counts requests stays. None: the estimate stands."""
        raise NotImplementedError

    def find(self, found: Placement | Rejection, instance: Instance | None) -> None:
        """While it is `pending`: keep what asking for a placement came to."""
        raise NotImplementedError

    def leave(self) -> None:
        """While it is `pending`: its request ended."""
        raise NotImplementedError


class Reservation(Held):
    """A claim that a store granted, at `now` by its clock."""

    __slots__ = ("_counts", "now", "parts")

    def __init__(
        self, parts: Sequence[Part], counts: Counts, now: float, headers: bytes, counts_tokens: bool
    ) -> None:
        """`counts` hear what is settled."""
        super().__init__(headers, counts_tokens)
        self.parts, self._counts, self.now = parts, counts, now

    def settle(self, tokens: int | None) -> None:
        """As of `Held`."""
        parts, self.parts = self.parts, ()
        if tokens is None or not self.counts_tokens:
            return
        corrections = []
        for key, window_s, amount, _, what, _ in parts:
            if what is TOKENS and tokens != amount:
                place = key, window_s, window(self.now, window_s), tokens - amount
                corrections.append(new_tuple(Correction, place))
        if corrections:
            self._counts.correct(corrections)


class LocalCounts:
    """Counts of one process."""

    def __init__(self, most_keys: int = MAX_KEYS) -> None:
        self._most = most_keys
        # By length of the window: its number and its counts. The past is forgotten whole.
        self._windows: dict[int, tuple[int, dict[str, int]]] = {}

    def claim(self, parts: Parts, now: float) -> Verdict:
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


def parts_of(key: str, whose: str, rpm: int, tpm: int) -> list[Part]:
    """The counts of one whose requests and tokens per minute are limited; 0: they are not."""
    parts = []
    if rpm:
        parts.append(new_tuple(Part, (key + "|r", MINUTE_S, 1, rpm, REQUESTS, whose)))
    if tpm:
        parts.append(new_tuple(Part, (key + "|t", MINUTE_S, 1, tpm, TOKENS, whose)))
    return parts


def window(now: float, window_s: int) -> int:
    """Number of the window that a moment lies in."""
    return int(now // window_s)


def left_s(now: float, window_s: int) -> int:
    """Whole seconds after which the window is over, 1 or more."""
    return window_s - int(now) % window_s


def rate_headers(parts: Parts, verdict: Verdict) -> bytes:
    """The `x-ratelimit-*` lines, as OpenAI's; of several limits of one kind, the one with the least left."""
    tightest: dict[str, tuple[int, int, int]] = {}
    for (_, window_s, _, limit, what, _), used in zip(parts, verdict.used, strict=True):
        left = limit - used
        if what not in tightest or left < tightest[what][0]:
            tightest[what] = left, limit, window_s
    lines = b""
    for what, (left, limit, window_s) in tightest.items():
        after = lines_after(what, left_s(verdict.now, window_s))
        lines += b"%b%d%b" % (lines_before(what, limit), left if left > 0 else 0, after)
    return lines


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
