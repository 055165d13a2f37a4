"""Which headers of requests and responses are read here, and which are passed on."""

from __future__ import annotations

from penstock.ingress.owners import HEADERS

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"upgrade",
        b"transfer-encoding",
        b"content-length",
    }
)
# Set by this gateway, or naming a target: never taken from outside (DESIGN 3.2).
ROUTING = frozenset(
    {
        b"target-pod",
        b"target-pod-ip",
        b"prefill-target-pod",
        b"prefill-target-pod-ip",
        b"x-penstock-route",
        b"x-request-id",
    }
)
# What this gateway alone is told: they steer it, and end here. Who asks (user, x-session-id) is passed on.
STEERING = frozenset({b"routing-strategy", b"config-profile", b"x-priority", *HEADERS})
REQUEST_DROPPED = HOP_BY_HOP | ROUTING | STEERING | {b"host", b"expect", b"http2-settings"}
RESPONSE_DROPPED = HOP_BY_HOP | ROUTING | {b"routing-strategy", b"config-profile"}
REQUEST_READ = frozenset(
    {
        b"routing-strategy",
        b"config-profile",
        b"user",
        *HEADERS,
        b"x-session-id",
        b"x-priority",
        b"content-type",
        b"x-request-id",
        b"expect",
        b"host",
        b"authorization",
        b"x-api-key",
        b"traceparent",
    }
)
COMMON = frozenset(
    {b"host", b"content-type", b"x-request-id", b"expect", b"authorization", b"x-api-key", b"traceparent"}
)
# Of two of them, the gateway and the instance could each read another one.
ONCE = frozenset({b"host", b"content-type"})
