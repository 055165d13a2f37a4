"""Compiles the ingress's data path, in about a minute: `make compile`, decision 0032.

`compile.py FOLDER MODULE ...` compiles these modules alone, into another folder.
"""

import sys

from penstock.common.compiling import compile_package

# What requests pass through. Not here: modules with classes of msgspec or pydantic, which read annotations
# that machine code has no more.
MODULES = (
    "penstock.common.adapters.nats_calls",
    "penstock.common.adapters.nats_client",
    "penstock.common.adapters.nats_connection",
    "penstock.common.adapters.nats_messages",
    "penstock.common.adapters.nats_wire",
    "penstock.common.block_hash",
    "penstock.common.cells",
    "penstock.common.codec",
    "penstock.common.event_log",
    "penstock.common.event_packing",
    "penstock.common.instances",
    "penstock.common.response_tail",
    "penstock.ingress.access_log",
    "penstock.ingress.adapters.client_connection",
    "penstock.ingress.adapters.engine_client",
    "penstock.ingress.adapters.engine_connection",
    "penstock.ingress.adapters.external_client",
    "penstock.ingress.adapters.limit_store",
    "penstock.ingress.adapters.pool",
    "penstock.ingress.adapters.redis_connection",
    "penstock.ingress.askers",
    "penstock.ingress.attempt",
    "penstock.ingress.block_hash",
    "penstock.ingress.breaker",
    "penstock.ingress.chunked_body",
    "penstock.ingress.claims",
    "penstock.ingress.exchange",
    "penstock.ingress.gateway",
    "penstock.ingress.http_wire",
    "penstock.ingress.ids",
    "penstock.ingress.in_flight",
    "penstock.ingress.leases",
    "penstock.ingress.limiter",
    "penstock.ingress.limits",
    "penstock.ingress.local_placing",
    "penstock.ingress.local_policy",
    "penstock.ingress.metering",
    "penstock.ingress.openai",
    "penstock.ingress.outcomes",
    "penstock.ingress.placing",
    "penstock.ingress.plans",
    "penstock.ingress.ports",
    "penstock.ingress.rates",
    "penstock.ingress.relay",
    "penstock.ingress.responses",
    "penstock.ingress.speeds",
    "penstock.ingress.standing",
    "penstock.ingress.store_line",
    "penstock.ingress.waiting_room",
)
if __name__ == "__main__":
    sys.exit(compile_package("penstock.ingress", MODULES, sys.argv[1:]))
