"""Settings of the traffic to instances: what seed 002 calls backend traffic policy and circuit breakers."""

from __future__ import annotations

from pydantic import Field

from penstock.common.settings import Settings

MOST = 1_000_000


class TrafficSettings(Settings):
    """Bounds per instance (or external endpoint) and over all of them, each for all workers together."""

    backend_max_connections: int = Field(
        1024,
        ge=1,
        le=65536,
        description="connections to one instance, of all workers together; with all in use requests wait for "
        "one; each worker may have one in any case",
    )
    backend_max_parallel_requests: int = Field(
        1024,
        ge=1,
        le=MOST,
        description="requests under way at one instance, of all workers together; further ones get a 503",
    )
    backend_max_pending_requests: int = Field(
        1024,
        ge=0,
        le=MOST,
        description="requests that may wait for a connection to one instance, of all workers together; "
        "further ones get a 503; 0: none waits",
    )
    backend_max_parallel_retries: int = Field(
        1024,
        ge=0,
        le=MOST,
        description="requests under way at one instance that another attempt failed before, of all workers "
        "together; beyond it the failure is the answer",
    )
    backend_max_requests_per_connection: int = Field(
        1024,
        ge=0,
        le=MOST,
        description="requests on one connection to an instance, then it is closed; 0: no limit",
    )
    gateway_max_connections: int = Field(
        1024,
        ge=1,
        le=MOST,
        description="connections to all instances and external endpoints, of all workers together; for one "
        "more an idle one is closed, else requests wait",
    )
    gateway_max_requests: int = Field(
        1024,
        ge=1,
        le=MOST,
        description="requests under way at all instances and external endpoints, of all workers together; "
        "further ones get a 503",
    )
    gateway_max_pending_requests: int = Field(
        1024,
        ge=0,
        le=MOST,
        description="requests that may wait for a connection, of all workers together; further ones get "
        "a 503",
    )
