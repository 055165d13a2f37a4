"""Decisions per second of one process, without the bus: `python -m penstock.scheduler.bench`.

Each decision is schedule(), the reservation in the ledger and the index, and the view's update. Prompts
are sessions: an eighth of their blocks is a system prompt shared by a twentieth of all sessions, five
eighths are the session's own, the last quarter is new in every request; every tenth session is new.
Finished work leaves the ledger in reports of 32, which are not part of a decision's time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.instances import InstanceTable, complete_key, encode_instance, instance_key
from penstock.common.messages import CompleteMarker, InFlight, LoadReport, Placed, Placement, ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.scheduler.bench_replicas import index_mb, most_on_one
from penstock.scheduler.ledger import InFlightLedger
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import CACHE_AWARE, STRATEGIES, Thresholds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.scheduler import schedule
from penstock.scheduler.view import ClusterView

MODEL = "m"
REPORT_EVERY = 32


def fleet(count: int) -> list[Instance]:
    """This many instances of one model."""
    endpoint = Endpoint("h", 8000)
    return [
        Instance(id=f"10.0.{number >> 8}.{number & 255}:8000", endpoint=endpoint, models=(MODEL,))
        for number in range(count)
    ]


def listing_of(instances: Iterable[Instance]) -> Listing:
    """A registry that holds these and is complete."""
    entries = {complete_key("bench"): Entry(encode_record(CompleteMarker("bench", ("bench",))), 1)}
    for revision, instance in enumerate(instances, 2):
        entries[instance_key(instance.id)] = Entry(encode_instance(instance), revision)
    return Listing(Position("bench", len(entries)), entries)


def table_of(instances: Iterable[Instance]) -> InstanceTable:
    """A synced table of these."""
    table = InstanceTable()
    table.apply(listing_of(instances))
    return table


def prompts(blocks: int, rng: random.Random) -> Iterator[bytes]:
    """Packed block hashes of one request after the other."""

    def fresh(count: int) -> bytes:
        return rng.randbytes(count * 8)

    systems = [fresh(blocks // 8) for _ in range(20)]
    sessions = [rng.choice(systems) + fresh(blocks * 5 // 8) for _ in range(2000)]
    new = blocks - len(sessions[0]) // 8
    while True:
        number = rng.randrange(len(sessions))
        if rng.random() < 0.1:
            sessions[number] = rng.choice(systems) + fresh(blocks * 5 // 8)
        yield sessions[number] + fresh(new)


def measure(policy: str, instances: int, blocks: int, decisions: int) -> list[float]:
    """CPU seconds of each decision."""
    rng, catalog = random.Random(1), Catalog(Thresholds())
    view, index, ledger = ClusterView(), PrefixIndex(1_000_000), InFlightLedger()
    view.refresh(table_of(fleet(instances)), index.forget)
    source, running, durations = prompts(blocks, rng), deque[InFlight](), []
    clock = time.thread_time  # what others on the machine do does not count
    for number in range(decisions):
        request = ScheduleRequest(
            f"d{number}", f"r{number}", MODEL, prompt_tokens=1000, block_hashes=next(source)
        )
        started = clock()
        view.advance(started)
        decision = schedule(request, view, index, catalog, default=policy, replicas=1)
        outcome = decision.outcome
        assert isinstance(outcome, Placement)
        placed = Placed(
            outcome.decision_id, "i", "1", outcome.instance, 1000, 0, b"", 1000 - outcome.matched_tokens
        )
        ledger.place(placed, 1.0, started)
        index.insert(decision.hashes, decision.slot, outcome.matched_blocks)
        view.take(ledger.changes())
        durations.append(clock() - started)
        running.append(InFlight(outcome.decision_id, outcome.instance, 1000))
        if number % REPORT_EVERY == 0:
            started_now = tuple(list(running)[-REPORT_EVERY:])
            finished = [
                running.popleft().decision_id for _ in range(min(REPORT_EVERY, len(running) - 8 * instances))
            ]
            ledger.report(
                LoadReport("i", "1", number // REPORT_EVERY + 1, started_now, tuple(finished)), clock()
            )
            ledger.expire(clock())
    return durations


def apply_cost(entries: int = 4096, rounds: int = 50) -> float:
    """Seconds the ledger takes per entry of a report: half started, half finished."""
    ledger, total = InFlightLedger(), 0.0
    for number in range(rounds):
        work = tuple(InFlight(f"{number}.{i}", f"instance-{i % 100}", 1000) for i in range(entries // 2))
        before = tuple(f"{number - 1}.{i}" for i in range(entries // 2))
        report = LoadReport("i", "1", number + 1, work, before)
        started = time.perf_counter()
        ledger.report(report, started)
        total += time.perf_counter() - started
    return total / entries / rounds


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="penstock.scheduler.bench", description=__doc__)
    parser.add_argument("--policy", choices=list(STRATEGIES), default=CACHE_AWARE)
    parser.add_argument("--decisions", type=int, default=20_000)
    options = parser.parse_args(argv)
    # First, while no freed memory can be used again.
    print(f"index: {index_mb():.0f} MB per million blocks, in chains of 64")
    print(
        f"{options.policy}\n{'instances':>10} {'blocks':>7} {'decisions/s':>12} {'p50 us':>8} {'p99 us':>8}"
    )
    for instances in (10, 100, 1000):
        for blocks in (64, 256):
            durations = np.array(measure(options.policy, instances, blocks, options.decisions))
            p50, p99 = np.percentile(durations, (50, 99)) * 1e6
            rate = 1 / durations.mean()
            print(f"{instances:>10} {blocks:>7} {rate:>12,.0f} {p50:>8.1f} {p99:>8.1f}")
    print(f"ledger: {apply_cost() * 1e6:.2f} us per entry of a report")
    herds(options.policy)
    return 0


def herds(policy: str) -> None:
    """Print how a burst of new prompts spreads, several replicas against one."""
    registry = listing_of(fleet(32))
    print("herd factor: most requests of a burst on one of 32 instances / the same with one replica")
    print(f"{'replicas':>10} {'event delay ms':>15} {'most':>5} {'factor':>7}")
    for delay_ms in (1, 5, 50):
        alone = most_on_one(policy, MODEL, 1, delay_ms / 1000, registry)
        for replicas in (2, 4, 8):
            most = most_on_one(policy, MODEL, replicas, delay_ms / 1000, registry)
            print(f"{replicas:>10} {delay_ms:>15} {most:>5} {most / alone:>7.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
