"""The flow of KV-cache events: one task for each publisher of one source's instances, engine to bus."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from uuid import uuid4

from penstock.common.block_hash import root_seed
from penstock.common.bus import Bus
from penstock.common.messages import KvEvents
from penstock.common.model import Instance, InstanceId
from penstock.common.subjects import KV
from penstock.discovery.followers import Followers
from penstock.discovery.instruments import Instruments
from penstock.discovery.kv_blocks import KvBlocks
from penstock.discovery.kv_events import KvEventError
from penstock.discovery.kv_feed import KvFeed, Next
from penstock.discovery.kv_policy import KvPolicy
from penstock.discovery.kv_targets import KvTarget, target_of
from penstock.discovery.ports import KvPublisher, KvPublishers

log = logging.getLogger(__name__)

CONNECT_FIRST_S, CONNECT_MOST_S = 0.5, 30.0
# A publisher that is silent for so long is connected to anew: its name may stand for another address.
SILENCE_S = 600.0
# Replays of one publisher: so many at once, and one more each second; a gap on top of them is a loss.
REPLAYS, REPLAYS_PER_S = 8, 1.0
# An engine publishes once a step, 100 times a second; above this rate it is read no faster, and what it then
# drops is a gap like any other.
RATE_MESSAGES, RATE_S = 100, 0.1


class _Allowance:
    """How many replays may be asked for."""

    def __init__(self) -> None:
        self._left, self._at = float(REPLAYS), 0.0

    def take(self, now: float) -> bool:
        """One of them, if any is left."""
        self._left = min(REPLAYS, self._left + (now - self._at) * REPLAYS_PER_S) if self._at else self._left
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Bridging:
    """Follows the publishers of a changing set of instances. `held` says whether this replica speaks for
    them; what is heard while it does not is followed, and not said."""

    def __init__(
        self,
        publishers: KvPublishers | None,
        bus: Bus,
        policy: KvPolicy,
        held: Callable[[], bool],
        instruments: Instruments,
    ) -> None:
        """Without `publishers`, nothing is followed."""
        self._publishers, self._bus, self._policy, self._held = publishers, bus, policy, held
        self._instruments = instruments
        self._followers = Followers(self._follow, "kv-events")
        self._faults: dict[InstanceId, str] = {}
        # Counts the times that the bus was lost: what was said before may not have been heard.
        self._losses = 0
        bus.on_connection(self._connection)

    def __len__(self) -> int:
        return len(self._followers)

    def keep(self, instances: Iterable[Instance]) -> None:
        """Follow exactly the publishers of these from here on."""
        if self._publishers is None:
            return
        wanted: dict[InstanceId, KvTarget] = {}
        faults: dict[InstanceId, str] = {}
        for instance in instances:
            try:
                target = target_of(instance, self._policy.ports)
            except ValueError as exc:
                faults[instance.id] = str(exc)
                continue
            if target is not None:
                wanted[instance.id] = target
        for instance_id in faults.keys() - self._faults.keys():
            log.warning("KV-cache events of %s are not followed: %s", instance_id, faults[instance_id])
        self._faults = faults
        self._followers.keep(wanted)

    async def run(self) -> None:
        """Start and end the tasks; until cancelled."""
        await self._followers.run()

    async def _follow(self, instance_id: InstanceId, target: KvTarget) -> None:
        feed = KvFeed(instance_id, self._blocks(target), lambda: uuid4().hex[:16], target.dp_rank)
        pause_s, complaint = CONNECT_FIRST_S, ""
        while True:
            try:
                await self._listen(feed, target)
                pause_s, complaint = CONNECT_FIRST_S, ""
            except Exception as exc:  # noqa: BLE001  # a publisher costs its own feed, never the service
                if str(exc) != complaint:
                    log.warning("KV-cache events of %s: %s", instance_id, exc)
                complaint = str(exc)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, CONNECT_MOST_S)

    def _blocks(self, target: KvTarget) -> KvBlocks | None:
        policy = self._policy
        if not policy.blocks:
            return None
        return KvBlocks(
            target.models,
            policy.block_size,
            policy.most_blocks,
            lambda model, salt: root_seed(policy.secret, model, salt),
        )

    async def _listen(self, feed: KvFeed, target: KvTarget) -> None:
        """Until the publisher is silent for long. Raises OSError if it cannot be connected to."""
        if self._publishers is None:
            return
        publisher = await self._publishers.connect(target)
        feed.doubt()
        losses, replays, clock = self._losses, _Allowance(), time.monotonic
        count, since = 0, clock()
        try:
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        sequence, payload = await publisher.receive()
                except TimeoutError:
                    return
                if publisher.interrupted():
                    feed.doubt()
                if losses != self._losses:
                    losses = self._losses
                    self._send(feed.announce())
                await self._take(feed, publisher, sequence, payload, replays)
                count += 1
                if count == RATE_MESSAGES:
                    # At least the loop's other work goes on between two rounds.
                    await asyncio.sleep(max(0.0, since + RATE_S - clock()))
                    count, since = 0, clock()
        finally:
            publisher.close()

    async def _take(
        self, feed: KvFeed, publisher: KvPublisher, sequence: int, payload: bytes, replays: _Allowance
    ) -> None:
        """Handle one message."""
        batches = self._instruments.kv_batches
        try:
            match feed.see(sequence):
                case Next.SKIP:
                    batches.inc("repeated")
                case Next.APPLY:
                    batches.inc("applied")
                    self._send(feed.apply(sequence, payload))
                case Next.RECOVER:
                    batches.inc("applied")
                    replayed: list[tuple[int, bytes]] = []
                    if sequence > feed.missing_from and replays.take(time.monotonic()):
                        replayed = await publisher.replay(feed.missing_from)
                        batches.inc("replayed", by=len(replayed))
                    lost = feed.lost
                    self._send(feed.recovered(replayed, sequence, payload))
                    batches.inc("lost", by=feed.lost - lost)
        except KvEventError as exc:
            batches.inc("malformed")
            log.debug("KV-cache events: %s", exc)
            self._send(feed.unknown())
            # Whoever sends nonsense is read slowly.
            await asyncio.sleep(RATE_S)

    def _send(self, messages: Iterable[KvEvents]) -> None:
        for message in messages:
            if self._held():
                self._bus.publish(KV, message, message.instance)

    def _connection(self, up: bool) -> None:
        self._losses += not up
