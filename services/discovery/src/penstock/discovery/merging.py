"""Several sources, one fleet: which of them speaks for an instance that more than one lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from penstock.common.model import Instance, InstanceId

# Written down by a person for this deployment: it wins over whatever is found.
STATIC = "endpoints"


def in_precedence(sources: Iterable[str]) -> tuple[str, ...]:
    """The static list first, then as given."""
    return tuple(sorted(sources, key=lambda name: name != STATIC))


class Listings:
    """What each source lists, as known to this replica; `order` is their precedence."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.order = in_precedence(sources)
        self._listed: dict[str, Mapping[InstanceId, Instance]] = {}

    def take(self, source: str, listed: Mapping[InstanceId, Instance]) -> None:
        """The source lists exactly these."""
        self._listed[source] = MappingProxyType(dict(listed))

    def count(self, source: str) -> int:
        """How many instances the source lists."""
        return len(self._listed.get(source, ()))

    def all(self) -> set[InstanceId]:
        """Every instance that some source lists."""
        return set().union(*self._listed.values())

    def speaker(self, instance_id: InstanceId) -> str:
        """The source whose description of the instance counts; empty if none lists it."""
        return next((name for name in self.order if instance_id in self._listed.get(name, ())), "")

    def won(self, source: str) -> dict[InstanceId, Instance]:
        """What the source lists and no other that comes before it."""
        earlier = [self._listed.get(name, {}) for name in self.order[: self.order.index(source)]]
        listed = self._listed.get(source, {})
        return {name: listed[name] for name in listed if not any(name in other for other in earlier)}
