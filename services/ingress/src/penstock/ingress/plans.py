"""Who may ask how much, and what a request adds to which counts: found once, then kept by user and model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from penstock.ingress.limit_settings import Limits, UserRecord
from penstock.ingress.limits import (
    TOKENS,
    Correction,
    Counts,
    Held,
    Part,
    Parts,
    Reservation,
    Verdict,
    left_s,
    lines_after,
    lines_before,
    new_tuple,
    parts_of,
    rate_headers,
    window,
)

if TYPE_CHECKING:
    from penstock.ingress.leases import Lease

MAX_PLANS = 8192


class Shape:
    """What all plans with the same limits have in common. `kinds`: of each limit what it counts, the limit,
    the length of its window, and whose it is; `several`: more than one of a kind."""

    __slots__ = ("_limits", "_lines", "_second", "counts_tokens", "kinds", "several")

    def __init__(self, parts: Sequence[Part]) -> None:
        self.kinds = [(part.what, part.limit, part.window_s, part.whose) for part in parts]
        self._limits = [part.limit for part in parts]
        tokens = sum(part.what is TOKENS for part in parts)
        self.counts_tokens = tokens > 0
        self.several = tokens > 1 or len(parts) - tokens > 1
        self._second, self._lines = -1, b""

    def lines(self, now: float) -> bytes:
        """The `x-ratelimit-*` lines, with `%d` for what is left of each limit."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._lines = b"".join(
                lines_before(what, limit) + b"%d" + lines_after(what, left_s(now, window_s))
                for what, limit, window_s, _ in self.kinds
            )
        return self._lines

    def headers(self, verdict: Verdict) -> bytes:
        """The lines for a claim that was granted; not for `several`."""
        limits, used, lines = self._limits, verdict.used, self.lines(verdict.now)
        if len(limits) == 2:
            return lines % (limits[0] - used[0], limits[1] - used[1])
        return lines % (limits[0] - used[0])


class Plan:
    """The counts that requests of one user for one model add to, by their `keys`. `counts`: there are any;
    `several`: more than one of a kind.

    `leases` are the first and the last of their leases, which `leased_from` a moment until another are good,
    `minute` is the window of that moment, and `lines` the header lines for their numbers; `seen`: asked for
    lately: the notes of `penstock.ingress.leases`."""

    __slots__ = (
        "counts",
        "counts_tokens",
        "keys",
        "leased_from",
        "leased_until",
        "leases",
        "lines",
        "minute",
        "seen",
        "several",
        "shape",
    )

    def __init__(
        self, parts: Sequence[Part], shape: Shape | None = None, keys: list[str] | None = None
    ) -> None:
        """What a request adds to `parts` is 1, or its tokens. `keys` and `shape` say the same."""
        self.keys = [part.key for part in parts] if keys is None else keys
        self.shape = shape = shape or Shape(parts)
        self.counts, self.counts_tokens, self.several = bool(self.keys), shape.counts_tokens, shape.several
        self.leases: tuple[Lease, Lease] | None = None
        self.leased_from = self.leased_until = 0.0
        self.minute, self.seen = 0, False
        self.lines = b""

    def parts(self, tokens: int) -> list[Part]:
        """What a request with an estimate of `tokens` adds."""
        parts = []
        for index, key in enumerate(self.keys):
            what, limit, window_s, whose = self.shape.kinds[index]
            amount = bounded(tokens, limit) if what is TOKENS else 1
            parts.append(new_tuple(Part, (key, window_s, amount, limit, what, whose)))
        return parts

    def held(self, parts: Sequence[Part], verdict: Verdict, counts: Counts) -> Reservation:
        """What a request holds whose claim of `parts` was granted; `counts` hear what is settled."""
        return Reservation(parts, counts, verdict.now, self.headers(parts, verdict), self.counts_tokens)

    def headers(self, parts: Parts, verdict: Verdict) -> bytes:
        """The header lines for a claim of `parts` that was granted."""
        return rate_headers(parts, verdict) if self.several else self.shape.headers(verdict)


def bounded(tokens: int, limit: int) -> int:
    """What is held for an estimate: of more than the limit the whole limit, so that in an empty window any
    request passes."""
    return tokens if 0 < tokens <= limit else limit if tokens > 0 else 1


class Asked(Held):
    """What a request asks a store for, and then holds: its plan's counts and an estimate of its tokens.
    Fulfils `Parts`, which are made when somebody looks: that takes as long as all else that is done here."""

    __slots__ = ("_counts", "now", "plan", "tokens")

    def __init__(self, plan: Plan, tokens: int, counts: Counts) -> None:
        """`counts` hear what is settled. `now` and `headers` are the verdict's."""
        super().__init__(b"", plan.counts_tokens)
        self.plan, self.tokens, self._counts = plan, tokens, counts
        self.now = 0.0

    def __len__(self) -> int:
        return len(self.plan.keys)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.plan.parts(self.tokens))

    def settle(self, tokens: int | None) -> None:
        """As of `Held`."""
        if tokens is None or not self.counts_tokens:
            return
        # Once is all.
        self.counts_tokens = False
        shape = self.plan.shape
        for index, key in enumerate(self.plan.keys):
            what, limit, window_s, _ = shape.kinds[index]
            delta = tokens - bounded(self.tokens, limit)
            if what is TOKENS and delta:
                place = key, window_s, window(self.now, window_s), delta
                self._counts.correct([new_tuple(Correction, place)])


class Allowances:
    """Who may ask how much: the defaults, and users' records. Plans that were made last are kept."""

    def __init__(self, default: Limits) -> None:
        self._default = default
        self._records: dict[str, UserRecord] = {}
        parts = parts_of("", "user", default.rpm, default.tpm)
        self._shape, self._ends = Shape(parts), [part.key for part in parts]
        self._plans: dict[tuple[str, str, tuple[Part, ...]], Plan] = {}
        # Of users without a record, whose model makes no difference.
        self._usual: dict[str, Plan] = {}

    @property
    def active(self) -> bool:
        """Whether anybody is limited."""
        return bool(self._records or self._default.rpm or self._default.tpm)

    def put(self, user: str, record: UserRecord | None) -> None:
        """A user's record; None: there is none any more."""
        self._plans.clear()
        self._usual.clear()
        if record is None:
            self._records.pop(user, None)
        else:
            self._records[user] = record

    def plan(self, user: str, model: str, more: tuple[Part, ...] = ()) -> Plan:
        """What requests of `user` (empty: nobody) for `model` add to, and `more`; empty: no limit."""
        plan = None if more else self._usual.get(user)
        if plan is not None:
            return plan
        if user and not more and user not in self._records:
            name = f"{len(user)}:{user}"
            plan = Plan((), self._shape, [name + end for end in self._ends])
            if len(self._usual) >= MAX_PLANS:
                self._usual.clear()
            self._usual[user] = plan
            return plan
        key = user, model, more
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            parts = self._parts(user, model) if user else []
            plan = self._plans[key] = Plan([*parts, *more])
        return plan

    def parts(self, user: str, model: str, tokens: int) -> list[Part]:
        """What a request of `user` for `model` with an estimate of `tokens` adds."""
        return self.plan(user, model).parts(tokens)

    def _parts(self, user: str, model: str) -> list[Part]:
        record, default = self._records.get(user), self._default
        if record is None:
            return parts_of(f"{len(user)}:{user}", "user", default.rpm, default.tpm)
        rpm = default.rpm if record.rpm is None else record.rpm
        tpm = default.tpm if record.tpm is None else record.tpm
        parts = parts_of(f"{len(user)}:{user}", "user", rpm, tpm)
        limits = record.models.get(model)
        if limits is not None:
            # The length keeps a user and a model apart from a user with a longer name.
            key = f"{len(user)}:{user}:{model}"
            parts += parts_of(key, "user for this model", limits.rpm, limits.tpm)
        return parts
