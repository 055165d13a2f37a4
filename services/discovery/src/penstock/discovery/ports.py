"""What discovery needs from outside besides the bus."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from penstock.common.model import Endpoint, EngineLoad, Instance
from penstock.discovery.kv_targets import KvTarget
from penstock.discovery.reconcile import Verdict

# Records passed over that a state names; the key `MORE` says how many there were beyond.
MAX_SKIPPED = 100
MORE = "..."


@dataclass(frozen=True)
class SourceState:
    """What a source lists. Complete: an instance that it does not name is gone.

    `skipped` says by key of the store why a record was passed over; see `bounded`. `stale` says why the
    store cannot be read, and is empty while it can; `instances` are the last known ones until then.
    """

    instances: tuple[Instance, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    stale: str = ""


def bounded(skipped: Mapping[str, str]) -> dict[str, str]:
    """The first `MAX_SKIPPED` of these by key, cut to sizes fit for a log, and the count of the rest."""
    kept = {key[:256]: skipped[key][:256] for key in sorted(skipped)[:MAX_SKIPPED]}
    if len(skipped) > MAX_SKIPPED:
        kept[MORE] = f"{len(skipped) - MAX_SKIPPED} more records were passed over"
    return kept


class Source(Protocol):
    """One way of finding instances."""

    @property
    def name(self) -> str:
        """Names the source in records, markers and its lease; the same in every replica."""

    def states(self) -> AsyncGenerator[SourceState, None]:
        """Everything the source lists, at once and again after every change; never ends and never raises
        for what a store does.

        A store that cannot be read yields the last known instances with the reason in `stale`; one that
        never could be read yields nothing, so that what the registry holds stays.
        """

    async def refresh(self) -> None:
        """List again soon; returns once asked, and the answer comes through `states`."""

    async def close(self) -> None:
        """Give connections back; `states` is not iterated any more."""


@dataclass(frozen=True)
class Reading:
    """What an engine's metrics say: its load, and which engine it is; None and empty if nothing. `absurd`
    names figures of load whose value was none."""

    load: EngineLoad | None = None
    engine: str = ""
    absurd: tuple[str, ...] = ()


class Prober(Protocol):
    """Asks engines how they are. Neither call raises, whatever an engine does."""

    async def check(self, endpoint: Endpoint) -> Verdict:
        """Whether the engine is healthy and which models it serves, within the probe timeout."""

    async def read_load(self, endpoint: Endpoint) -> Reading:
        """What the engine reports of itself, within the probe timeout."""


class KvPublisher(Protocol):
    """A connection to what publishes an engine's KV-cache events; it comes back by itself when lost."""

    async def receive(self) -> tuple[int, bytes]:
        """The next message: its sequence number and its payload.

        Raises:
            OSError: nothing more will come.
        """

    def interrupted(self) -> bool:
        """Whether the connection was lost since the last call."""

    async def replay(self, first: int) -> list[tuple[int, bytes]]:
        """The messages from number `first` on that the engine still has, bounded in number, size and time;
        none if it cannot be asked."""

    def close(self) -> None:
        """End it."""


class KvPublishers(Protocol):
    """Connects to publishers."""

    async def connect(self, target: KvTarget) -> KvPublisher:
        """Raises OSError: there is no such host, or none that may be connected to."""
