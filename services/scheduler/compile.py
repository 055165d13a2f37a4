"""Compiles what the scheduler decides by, in about a minute: `make compile`, decision 0050."""

import sys

from penstock.common.compiling import compile_package

# What requests, and reports on them, pass through. Not here: modules with classes of msgspec or pydantic,
# which read annotations that machine code has no more, and the policies' own arithmetic, which numpy does.
MODULES = (
    "penstock.common.adapters.nats_calls",
    "penstock.common.adapters.nats_client",
    "penstock.common.adapters.nats_connection",
    "penstock.common.adapters.nats_messages",
    "penstock.common.adapters.nats_wire",
    "penstock.common.cells",
    "penstock.common.codec",
    "penstock.common.event_log",
    "penstock.common.event_packing",
    "penstock.scheduler.ages",
    "penstock.scheduler.candidates",
    "penstock.scheduler.chain",
    "penstock.scheduler.columns",
    "penstock.scheduler.draws",
    "penstock.scheduler.echo",
    "penstock.scheduler.explaining",
    "penstock.scheduler.feed",
    "penstock.scheduler.generations",
    "penstock.scheduler.instruments",
    "penstock.scheduler.kv_bound",
    "penstock.scheduler.ledger",
    "penstock.scheduler.loads",
    "penstock.scheduler.peers",
    "penstock.scheduler.policies.filters",
    "penstock.scheduler.policies.pickers",
    "penstock.scheduler.prefix_index",
    "penstock.scheduler.recording",
    "penstock.scheduler.replica",
    "penstock.scheduler.scheduler",
    "penstock.scheduler.service",
    "penstock.scheduler.sums",
    "penstock.scheduler.sweep",
    "penstock.scheduler.telling",
    "penstock.scheduler.untold",
    "penstock.scheduler.view",
)
if __name__ == "__main__":
    sys.exit(compile_package("penstock.scheduler", MODULES, sys.argv[1:]))
