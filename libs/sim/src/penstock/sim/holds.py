"""KV cache that prefill keeps for another engine to fetch: once, within its lease, for the same prompt."""

from typing import NamedTuple


class HoldError(Exception):
    """A fetch that the engine refuses; real ones answer wrong text or die of it."""


class Hold(NamedTuple):
    """What is kept under a key: the finished request in the engine, its prompt's digest and tokens. `rid` is
    the name that the gateway gave the request, where it did."""

    engine_id: str
    digest: str
    tokens: int
    until_s: float
    rid: str = ""


class Holds:
    """Times are seconds of any one clock. Every hold ends fetched, cancelled, replaced or expired."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.kept = self.fetched = self.cancelled = self.expired = 0
        self._held: dict[str, Hold] = {}

    def __len__(self) -> int:
        return len(self._held)

    def overdue(self, now: float, grace_s: float) -> int:
        """Holds that outlived their lease by more than `grace_s`."""
        return sum(hold.until_s + grace_s < now for hold in self._held.values())

    def keep(self, key: str, hold: Hold) -> Hold | None:
        """Begin a hold; the one that was there under the key ends."""
        replaced = self._held.pop(key, None)
        self.cancelled += replaced is not None
        self._held[key] = hold
        self.kept += 1
        return replaced

    def fetch(self, key: str, digest: str) -> Hold:
        """End a hold by handing it over. Raises HoldError."""
        hold = self._held.get(key)
        if hold is None:
            raise HoldError(f"nothing is kept under {key}: never was, fetched before, cancelled or expired")
        if hold.digest != digest:
            raise HoldError(f"what is kept under {key} belongs to another prompt")
        del self._held[key]
        self.fetched += 1
        return hold

    def has(self, key: str) -> bool:
        """Whether something is kept under the key."""
        return key in self._held

    def cancel(self, rid: str) -> list[Hold]:
        """End the holds of a request that nobody wants any more."""
        unwanted = [key for key, hold in self._held.items() if hold.rid == rid]
        self.cancelled += len(unwanted)
        return [self._held.pop(key) for key in unwanted]

    def expire(self, now: float) -> list[Hold]:
        """End those whose lease is over."""
        over = [key for key, hold in self._held.items() if hold.until_s <= now]
        self.expired += len(over)
        return [self._held.pop(key) for key in over]
