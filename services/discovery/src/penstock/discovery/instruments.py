"""The numbers that discovery exports."""

from __future__ import annotations

from penstock.common.telemetry import Metrics


class Instruments:
    """Counters and histograms of one discovery process; gauges are read where their values live."""

    def __init__(self, metrics: Metrics) -> None:
        self.probe_seconds = metrics.histogram(
            "penstock_discovery_probe_seconds", "Time of a health check"
        ).labels()
        self.probe_failures = metrics.counter(
            "penstock_discovery_probe_failures_total", "Failed health checks", "fault"
        )
        self.load_readings = metrics.counter(
            "penstock_discovery_load_readings_total",
            "Readings of engine load: read, absent, or skipped because too many were under way",
            "result",
        )
        self.absurd_figures = metrics.counter(
            "penstock_discovery_absurd_figures_total",
            "Figures of engine load that were not used: negative, not finite, no number, or far too large",
            "figure",
        )
        self.writes = metrics.counter(
            "penstock_discovery_registry_writes_total",
            "Writes to the registry: written, deleted, conflict (another writer was first), failed",
            "result",
        )
        self.changes = metrics.counter(
            "penstock_discovery_changes_total",
            "Changes of instances: added, updated, removed, stale, recovered, unhealthy, draining",
            "source",
            "change",
        )
        self.skipped = metrics.counter(
            "penstock_discovery_skipped_records_total",
            "Records of a source that were passed over, each counted once for each reason",
            "source",
        )
        self.outages = metrics.counter(
            "penstock_discovery_source_outages_total", "Times that a source could not be read", "source"
        )
        self.kv_batches = metrics.counter(
            "penstock_discovery_kv_batches_total",
            "Batches of KV-cache events: applied, repeated (a replay brought them already), replayed, lost, "
            "malformed",
            "result",
        )
