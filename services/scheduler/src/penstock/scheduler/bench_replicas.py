"""What the prefix index weighs, and how replicas spread a burst; printed by `penstock.scheduler.bench`."""

from __future__ import annotations

import random
import resource
from collections import Counter, deque
from pathlib import Path

from penstock.common.bus import Listing
from penstock.common.identity import Identity
from penstock.common.messages import (
    Heartbeat,
    InFlight,
    LoadReport,
    PlacedFeed,
    Placement,
    ScheduleBatch,
    ScheduleRequest,
)
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.replica import Replica

BLOCKS, CHAIN, SLOTS = 1_000_000, 64, 100
# A burst of new prompts, one message each, within BURST_S, on a fleet with work in flight.
BURST, BURST_S, IN_FLIGHT = 128, 0.004, 8


def index_mb() -> float:
    """Resident MB that a million blocks take, in chains of 64 of which one in 100 instances holds each."""
    rng, index = random.Random(1), PrefixIndex(2 * BLOCKS)
    before = _resident_bytes()
    for _ in range(BLOCKS // CHAIN):
        index.insert([rng.getrandbits(60) for _ in range(CHAIN)], rng.randrange(SLOTS))
    return (_resident_bytes() - before) / len(index) * BLOCKS / 1e6


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def most_on_one(policy: str, model: str, replicas: int, feed_s: float, fleet: Listing) -> int:
    """Requests of the burst on the fullest instance, the replicas asked in turn; what one places reaches the
    others after `feed_s`, which is also the window in which they know nothing of each other."""
    own = [Identity("scheduler", f"s{number}", "1") for number in range(replicas)]
    members = [Replica(one, Catalog(Thresholds()), policy, 100_000) for one in own]
    for one in members:
        one.registry(fleet)
        for sibling in own:
            one.peers.heard(Heartbeat("scheduler", sibling.id, "1", True), 0.0)
        work = tuple(InFlight(f"{n}.{name}", name, 1000, 1) for name in _ids(one) for n in range(IN_FLIGHT))
        one.report(LoadReport("others", "1", 1, work, (), 0, 1), 0.0)
    placed: Counter[str] = Counter()
    mail: deque[tuple[float, PlacedFeed]] = deque()
    for number in range(BURST):
        now = 0.2 + BURST_S * number / BURST
        while mail and mail[0][0] <= now:
            at, feed = mail.popleft()
            for one in members:
                one.follow(feed, at)
        member = members[number % replicas]
        request = ScheduleRequest(f"b{number}", "r", model, prompt_tokens=500, block_hashes=_new(number))
        batch = ScheduleBatch("i", "1", 50.0, (request,))
        decision = member.decide(request, now)
        assert isinstance(decision.outcome, Placement)
        placed[decision.outcome.instance] += 1
        told = member.reserve(batch, request, decision, now)
        mail.extend((now + feed_s, feed) for feed in member.feed(batch, told))
    return max(placed.values())


def _ids(one: Replica) -> list[str]:
    return [instance.id for instance in one.table.instances()]


def _new(number: int) -> bytes:
    return random.Random(number).randbytes(8 * 8)
