"""What all sources of a process share: the outside, the registry as watched, and how to go about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from penstock.common.bus import Bus
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.orders import Orders
from penstock.common.routing_events import INSTANCE, InstanceEvent
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.instruments import Instruments
from penstock.discovery.kv_policy import KvPolicy
from penstock.discovery.merging import Listings
from penstock.discovery.ports import KvPublishers, Prober
from penstock.discovery.probing import Slots
from penstock.discovery.registry import RegistryView
from penstock.discovery.registry_writer import RegistryWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbePolicy:
    """How instances are probed and judged."""

    interval_s: float = 5.0
    rise: int = 1
    fall: int = 2
    concurrency: int = 64
    flap_window_s: float = 600.0


@dataclass(frozen=True)
class Timing:
    """Intervals of the registry's writer, in seconds."""

    lease_renew_s: float = 2.0
    lease_takeover_s: float = 10.0
    bucket_retry_s: float = 0.5
    write_retry_first_s: float = 0.1
    write_retry_max_s: float = 5.0
    # A holder whose source listed nothing for so long marks what the registry holds as stale.
    silent_start_s: float = 10.0
    # Records of a source that no replica runs are removed after it; checked `orphan_check_s` apart.
    forget_source_s: float = 300.0
    orphan_check_s: float = 5.0


@dataclass(frozen=True)
class Surroundings:
    """What all sources of a process share."""

    bus: Bus
    events: EventWriter
    identity: Identity
    instruments: Instruments
    view: RegistryView
    writer: RegistryWriter
    listings: Listings
    prober: Prober
    slots: Slots
    policy: ProbePolicy
    timing: Timing
    allowed: AllowedHosts
    orders: Orders
    kv_publishers: KvPublishers | None = None
    kv_policy: KvPolicy = field(default_factory=KvPolicy)
    clock: Callable[[], float] = time.monotonic

    def tell(self, events: Iterable[InstanceEvent]) -> None:
        """Write changes to the routing log, the log and the counters."""
        for event in events:
            model = event.models[0] if event.models else ""
            self.events.emit(INSTANCE, model, event.instance, event)
            self.instruments.changes.inc(event.source, event.change)
            log.info("instance %s", event.change, extra={"fields": msgspec.to_builtins(event)})
