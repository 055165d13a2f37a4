"""The scheduler's metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from penstock.common.instances import expose
from penstock.common.machine_code import compiled
from penstock.common.messages import Placement
from penstock.common.telemetry import Cell, Metrics
from penstock.scheduler.decisions import Decision
from penstock.scheduler.dividing import IMBALANCE
from penstock.scheduler.intake import Intake
from penstock.scheduler.policies.catalog import WEIGHTED
from penstock.scheduler.pulse import Pulse
from penstock.scheduler.replica import Replica
from penstock.scheduler.warming import Warming

DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)


class Instruments:
    """Counters that the service adds to, and gauges that read the replica at scrape time."""

    def __init__(
        self, metrics: Metrics, replica: Replica, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics, self._replica, self._clock = metrics, replica, clock
        self._decisions = metrics.counter(
            "penstock_scheduler_decisions_total",
            "Decisions by policy and outcome: placement, or why not",
            "policy",
            "outcome",
        )
        # By policy: their labels are few.
        self._placed: dict[str, Cell] = {}
        self._seconds = metrics.histogram(
            "penstock_scheduler_decision_seconds", "Time of one decision", bounds=DECISION_BUCKETS
        ).labels()
        blocks = metrics.counter("penstock_scheduler_prefix_blocks_total", "Prompt blocks placed", "result")
        self._looked_up, self._matched = blocks.labels("looked_up"), blocks.labels("matched")
        self.expired = metrics.counter(
            "penstock_scheduler_batches_expired_total", "Schedule messages whose budget was spent"
        ).labels()
        self.feed_missed = metrics.counter(
            "penstock_scheduler_feed_missed_total", "Placements of other replicas that never arrived"
        ).labels()
        self.policy_faults = metrics.counter(
            "penstock_scheduler_policy_faults_total",
            "Decisions that a policy of the operator's own failed to make, made by least-request",
            "policy",
            "kind",
        )
        self._kv_events = metrics.counter(
            "penstock_scheduler_kv_events_total",
            "Messages on engines' KV caches by what became of them; cleared and gap empty an instance's "
            "part of the prefix index",
            "result",
        )
        self._ledger_dropped = metrics.counter(
            "penstock_scheduler_ledger_dropped_total", "What the ledger does not count, by reason", "reason"
        )
        self._imbalances = metrics.counter(
            "penstock_scheduler_pair_imbalances_total",
            "Choices of a prefill or decode instance left to the least loaded, since loads differed too much",
            "role",
        )
        metrics.gauge(
            "penstock_scheduler_machine_code", "1 if what decides is compiled", lambda: float(compiled())
        )
        self._gauges(metrics)

    def _gauges(self, metrics: Metrics) -> None:
        replica, table, ledger = self._replica, self._replica.table, self._replica.ledger
        expose(table, metrics)
        for name, text, read in (
            ("prefix_index_blocks", "Blocks held by the prefix index", lambda: len(replica.index)),
            ("prefix_index_max_blocks", "Blocks that it may hold", lambda: replica.index.max_blocks),
            ("in_flight_requests", "Requests in flight, by the ledger", lambda: ledger.in_flight),
            ("ingresses", "Ingresses whose work is counted", lambda: ledger.ingresses),
            ("dirty_ingresses", "Ingresses of which a report is missing", lambda: ledger.dirty),
            (
                "behind_placements",
                "Placements of other replicas that this one knows of and has not applied, or missed",
                lambda: replica.behind,
            ),
            ("kv_feeds", "Instances whose KV-cache events are heard", lambda: replica.kv_feeds.counts()[0]),
            (
                "kv_feeds_distrusted",
                "Those of them that are not used for want of precision",
                lambda: replica.kv_feeds.counts()[1],
            ),
            ("replicas", "Schedulers alive, this one included", lambda: replica.peers.replicas),
            ("discoveries", "Replicas of discovery alive", lambda: replica.peers.discoveries),
        ):
            metrics.gauge(f"penstock_scheduler_{name}", text, read)
        metrics.gauge(
            "penstock_scheduler_prefix_precision_ratio",
            "Share of the tokens expected in the KV cache that the engine found there, last 200 answers",
            replica.kv_feeds.precisions,
            "instance",
            "feed",
        )
        metrics.gauge(
            "penstock_scheduler_status_age_seconds",
            "Age of an engine's own numbers",
            lambda: [((i,), age) for i, age in replica.view.status_ages(self._clock())],
            "instance",
        )

        metrics.tally(
            "penstock_scheduler_prompts_expired_total",
            "Prompts that an engine kept for decode and nobody fetched within their lease, by its own count",
            lambda: [((i,), count) for i, count in replica.view.kv_expired()],
            "instance",
        )

    def follow(self, warming: Warming, pulse: Pulse, intake: Intake) -> None:
        """Read what makes the replica take requests."""
        metrics = self._metrics
        metrics.gauge(
            "penstock_scheduler_loop_lags",
            "1 while requests are left to the siblings since the event loop lags",
            lambda: float(pulse.lags),
        )
        metrics.gauge(
            "penstock_scheduler_taking_requests", "1 while requests are taken", lambda: float(intake.open)
        )
        metrics.tally(
            "penstock_scheduler_warm_ups_total",
            "Ends of warming up: with a snapshot, without one that was asked for (cold), alone; and refusals",
            lambda: [((end,), float(count)) for end, count in warming.ends.items()],
            "end",
        )

    def decided(self, decision: Decision, seconds: float) -> None:
        """Count one decision."""
        outcome = decision.outcome
        if isinstance(outcome, Placement):
            placed = self._placed.get(decision.policy)
            if placed is None:
                placed = self._placed[decision.policy] = self._decisions.labels(decision.policy, "placement")
            placed.value += 1
            self._looked_up.value += len(decision.hashes)
            self._matched.value += outcome.matched_blocks
            if decision.prefill is not None or IMBALANCE in decision.excluded:
                self._count_imbalances(decision)
        else:
            # A weighted list is text of a client, who may send any number of them.
            policy = WEIGHTED if ":" in decision.policy else decision.policy
            self._decisions.inc(policy, outcome.reason.value)
        self._seconds.observe(seconds)

    def _count_imbalances(self, decision: Decision) -> None:
        for one in (decision, decision.prefill):
            if one is not None and one.basis is not None and IMBALANCE in one.excluded:
                self._imbalances.inc(one.basis.profile.role.value)

    def refresh(self) -> None:
        """Take over what the replica counts itself."""
        self.feed_missed.value = float(self._replica.feed_missed)
        for result, count in self._replica.kv_feeds.results.items():
            self._kv_events.labels(result).value = float(count)
        for reason, count in self._replica.ledger.dropped.items():
            self._ledger_dropped.labels(reason).value = float(count)
