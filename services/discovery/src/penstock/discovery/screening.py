"""What a source lists is untrusted: each instance passes or is passed over with a reason, alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from penstock.common.codec import DecodeError, decode_record
from penstock.common.instances import encode_instance
from penstock.common.model import Instance, InstanceId
from penstock.discovery.allowed import AllowedHosts

# Leaves room in the registry's 64 KiB for what the engine itself names.
MAX_RECORD_BYTES = 16 * 1024
MAX_INSTANCES = 20_000
MAX_REMEMBERED = 1024


class Screen:
    """Remembers what passed, so that an unchanged instance costs one comparison."""

    def __init__(self, allowed: AllowedHosts) -> None:
        self._allowed = allowed
        self._passed: dict[InstanceId, Instance] = {}

    def sift(self, instances: Iterable[Instance]) -> tuple[dict[InstanceId, Instance], dict[str, str]]:
        """(what passes by id, why by id for the rest)."""
        passed: dict[InstanceId, Instance] = {}
        refused: dict[str, str] = {}
        for instance in instances:
            fault = self._fault(instance, passed)
            if fault:
                refused[str(instance.id)] = fault
            else:
                passed[instance.id] = instance
        self._passed = passed
        return passed, refused

    def _fault(self, instance: Instance, passed: Mapping[InstanceId, Instance]) -> str:
        if instance.id in passed:
            return "another record of this source has the same id"
        if len(passed) >= MAX_INSTANCES:
            return f"over {MAX_INSTANCES} instances in one source"
        if self._passed.get(instance.id) == instance:
            return ""
        return self._allowed.refusal(instance.endpoint.host) or _record_fault(instance)


def _record_fault(instance: Instance) -> str:
    if not instance.id:
        return "its id is empty"
    try:
        encoded = encode_instance(instance)
        decode_record(Instance, encoded)
    except DecodeError as exc:
        return str(exc)
    except (ValueError, TypeError):
        return "not a valid instance: it holds text that is not Unicode, or a value of the wrong type"
    if len(encoded) > MAX_RECORD_BYTES:
        return f"{len(encoded)} bytes, over {MAX_RECORD_BYTES}"
    return ""


class Told:
    """Which passed-over records were told of: one event for each key and reason, until it is right again."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()

    def fresh(self, skipped: Mapping[str, str], *, complete: bool) -> list[tuple[str, str]]:
        """What is to be told. `complete` says that what is not named here is right again."""
        if complete:
            for known in self._told.keys() - skipped.items():
                del self._told[known]
        fresh = [item for item in skipped.items() if item not in self._told]
        for item in fresh:
            self._told[item] = None
            if len(self._told) > MAX_REMEMBERED:
                self._told.popitem(last=False)
        return fresh


def printable(text: str) -> str:
    """Text of a store as it may stand in a log line or an event: one line of bounded length."""
    cut = text[:256].encode("utf-8", "replace").decode()
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in cut)
