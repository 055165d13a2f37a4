"""Faults on demand: what can go wrong, how it is asked for, and which request it strikes."""

from typing import Annotated, Literal

import msgspec

FaultKind = Literal[
    "refuse",
    "drop-before-headers",
    "hang-before-headers",
    "slow-start",
    "429",
    "500",
    "garbage",
    "hang-mid-stream",
    "drop-mid-stream",
    "garbage-mid-stream",
]

MID_STREAM: frozenset[FaultKind] = frozenset({"hang-mid-stream", "drop-mid-stream", "garbage-mid-stream"})

# The engine itself ends the connection; a client that sees this has not left.
SEVERING: frozenset[FaultKind] = frozenset(
    {"refuse", "drop-before-headers", "garbage", "drop-mid-stream", "garbage-mid-stream"}
)

_MOST_ARMED = 64


class FaultError(ValueError):
    """A fault that was asked for in a way that is not understood."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of misbehaviour.

    `count`: requests it strikes, None for all until cleared. `path`: the path it strikes, empty for every
    generation endpoint. `tokens`: output tokens per choice that get out first (mid-stream kinds). `ms`: how
    long `slow-start` waits and `refuse` lasts. `reset`: drop with a TCP reset instead of an orderly close.
    """

    kind: FaultKind
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None
    path: str = ""
    tokens: Annotated[int, msgspec.Meta(ge=0)] = 1
    ms: Annotated[int, msgspec.Meta(ge=0, le=3_600_000)] = 1000
    reset: bool = False


def parse_header(value: str) -> Fault:
    """`kind[;parameter=value]...`, as in `drop-mid-stream;tokens=3`. Raises FaultError."""
    kind, *parameters = (part.strip() for part in value.split(";"))
    fields: dict[str, str] = {"kind": kind}
    for parameter in parameters:
        name, _, text = parameter.partition("=")
        fields[name.strip()] = text.strip()
    try:
        return msgspec.convert(fields, Fault, strict=False)
    except msgspec.ValidationError as exc:
        raise FaultError(f"x-sim-fault: {exc}") from exc


def parse_body(body: bytes) -> Fault:
    """JSON object with the fields of Fault. Raises FaultError."""
    try:
        return msgspec.json.decode(body, type=Fault)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise FaultError(str(exc)) from exc


class FaultBook:
    """Armed faults strike in the order they were armed, each until its count is used up."""

    def __init__(self) -> None:
        self._armed: list[tuple[Fault, int | None]] = []

    def arm(self, fault: Fault) -> None:
        """Raises FaultError when too many are armed."""
        if len(self._armed) >= _MOST_ARMED:
            raise FaultError(f"{_MOST_ARMED} faults are armed already: DELETE /sim/fault first")
        self._armed.append((fault, fault.count))

    def clear(self) -> None:
        self._armed.clear()

    def take(self, path: str, *, generates: bool) -> Fault | None:
        """The fault that strikes a request for `path`, if any, with its count taken down."""
        for place, (fault, left) in enumerate(self._armed):
            if fault.path != path and (fault.path or not generates):
                continue
            if fault.kind in MID_STREAM and not generates:
                continue
            if left == 1:
                del self._armed[place]
            elif left is not None:
                self._armed[place] = (fault, left - 1)
            return fault
        return None
