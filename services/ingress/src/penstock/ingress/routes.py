"""Traffic splitting: which route takes a request, by canary, weight or prefix, and the fallback chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import xxhash

from penstock.common.model import Endpoint
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.route_config import LOCAL, RouteDocument, RouteEntry
from penstock.ingress.sampling import without_credentials


class Proxy(NamedTuple):
    """An HTTP proxy; `authorization` is the whole value of Proxy-Authorization, or empty."""

    host: str
    port: int
    authorization: str = ""


# The proxy for a scheme, host and port; None: straight.
ProxyFor = Callable[[str, str, int], Proxy | None]


def _straight(scheme: str, host: str, port: int) -> Proxy | None:
    return None


@dataclass(frozen=True)
class External:
    """An endpoint that no scheduler places: where it is, and what a request to it says."""

    url: str
    endpoint: Endpoint
    host: bytes
    base_path: bytes
    authorization: bytes = b""
    forward_authorization: bool = False
    proxy: Proxy | None = None

    def request_head(self, head: RequestHead, request_id: str, length: int) -> bytes:
        """The client's request as the endpoint gets it: less what ends at this hop, and less credentials that
        are for this gateway."""
        block = head.block if self.forward_authorization else without_credentials(head.block)
        target = join_path(self.base_path, head.origin_form)
        extra = self.authorization
        if self.proxy is not None and self.endpoint.scheme == "http":
            target = b"http://" + self.host + target
            if self.proxy.authorization:
                extra += b"proxy-authorization: %b\r\n" % self.proxy.authorization.encode()
        return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            head.method,
            target,
            self.host,
            block,
            extra,
            request_id.encode(),
            length,
        )


@dataclass(frozen=True)
class Route:
    """One entry, ready to use. `external` is None for `local`; `rewrite` is the model to send, or empty."""

    name: str
    external: External | None
    weight: int
    prefix: str | None
    rewrite: str
    canary_header: tuple[bytes, bytes | None] | None
    canary_percent: float

    @property
    def canary(self) -> bool:
        """Whether it takes the requests that ask for it, and only those."""
        return self.canary_header is not None or self.canary_percent > 0

    def fits(self, model: str) -> bool:
        """Whether its prefix allows the model; without a prefix every model is."""
        return self.prefix is None or matched(self.prefix, model) is not None


class Choice(NamedTuple):
    """The route of a request (None: none takes it), and why: canary, weight, prefix or none."""

    route: Route | None
    reason: str


@dataclass(frozen=True)
class Routes:
    """A route configuration: what takes requests in `entries`, and `chain`, the fallbacks in order."""

    policy: str
    entries: tuple[Route, ...]
    chain: tuple[Route, ...]

    def choose(self, head: RequestHead, model: str, session: str, draw: float, user: str) -> Choice:
        """Who takes a request. `draw` in [0, 1) decides by weight, or `session`, if there is one: the same
        session goes to the same route for as long as that one's share does not shrink. `user` is who asks,
        whom `canary_percent` counts; empty for nobody."""
        for entry in self.entries:
            if entry.canary and entry.fits(model) and _asked(entry, head, user):
                return Choice(entry, "canary")
        route = (
            _by_weight(self.entries, session, draw)
            if self.policy == "weight"
            else _by_prefix(self.entries, model)
        )
        return Choice(route, self.policy if route else "none")


def build(document: RouteDocument, proxy_for: ProxyFor = _straight) -> Routes | None:
    """Routes out of their checked configuration; None if it is empty: then everything is local."""
    if not document.routes:
        return None
    taken: dict[str, int] = {}
    entries = tuple(_route(entry, proxy_for, taken) for entry in document.routes)
    chain = [
        route
        for route, entry in zip(entries, document.routes, strict=True)
        if entry.fallback and route.external is not None
    ]
    return Routes(document.policy, entries, tuple(chain))


def matched(pattern: str, model: str) -> int | None:
    """How well a prefix pattern fits a model: the length of what is matched, exact ones beyond any other;
    None if it does not. Only a `*` at the end is a wildcard."""
    if pattern.endswith("*"):
        return len(pattern) - 1 if model.startswith(pattern[:-1]) else None
    return 1 << 30 if pattern == model else None


def join_path(base_path: bytes, origin_form: bytes) -> bytes:
    """Path and query at an endpoint: its base before the client's path, whose `/v<digits>` is dropped where
    the base ends in one: `/api/v3` and `/v1/chat/completions` are `/api/v3/chat/completions`."""
    last = base_path.rpartition(b"/")[2]
    if _is_version(last):
        head, slash, rest = origin_form[1:].partition(b"/")
        if slash and _is_version(head):
            return base_path + slash + rest
    return base_path + origin_form


def _is_version(segment: bytes) -> bool:
    return segment[:1] == b"v" and segment[1:].isdigit()


def header_of(block: bytes, name: bytes) -> bytes | None:
    """The value of the first header of this (lower case) name among whole lines."""
    for line in block.split(b"\r\n"):
        field, colon, value = line.partition(b":")
        if colon and field.lower() == name:
            return value.strip(b" \t")
    return None


def _by_weight(entries: tuple[Route, ...], session: str, draw: float) -> Route | None:
    takers = [route for route in entries if route.weight > 0]
    if not takers:
        return None
    if session:
        # Weighted rendezvous: only sessions of a share that shrank move.
        return max(takers, key=lambda route: _pull(route, session))
    rest = draw * sum(route.weight for route in takers)
    for route in takers:
        rest -= route.weight
        if rest < 0:
            return route
    return takers[-1]


def _pull(route: Route, session: str) -> float:
    return -route.weight / math.log(_unit(session, route.name))


def _by_prefix(entries: tuple[Route, ...], model: str) -> Route | None:
    best, longest = None, -1
    for route in entries:
        if route.canary or route.prefix is None:
            continue
        length = matched(route.prefix, model)
        if length is not None and length > longest:
            best, longest = route, length
    return best


def _asked(route: Route, head: RequestHead, user: str) -> bool:
    if route.canary_header is not None:
        name, wanted = route.canary_header
        # Some headers stop at this gateway, and are kept apart.
        value = header_of(head.block, name)
        value = head.read.get(name) if value is None else value
        if value is not None and wanted in (None, value):
            return True
    return bool(user) and _unit(user, route.name) * 100 < route.canary_percent


def _unit(key: str, salt: str) -> float:
    """A number in (0, 1) that depends on both and on nothing else."""
    digest = xxhash.xxh3_64_intdigest(key.encode("utf-8", "replace"), xxhash.xxh3_64_intdigest(salt.encode()))
    return ((digest >> 11) + 0.5) / (1 << 53)


def _route(entry: RouteEntry, proxy_for: ProxyFor, taken: dict[str, int]) -> Route:
    external = None if entry.base_url == LOCAL else _external(entry, proxy_for)
    header, colon, value = entry.canary_header.partition(":")
    canary = (header.lower().encode(), value.strip().encode() if colon else None) if header else None
    name = entry.name or (external.host.decode() if external is not None else LOCAL)
    taken[name] = taken.get(name, 0) + 1
    return Route(
        name=name if taken[name] == 1 else f"{name}#{taken[name]}",
        external=external,
        weight=0 if entry.canary else entry.weight or 0,
        prefix=entry.prefix,
        rewrite=entry.model if entry.rewrite_model else "",
        canary_header=canary,
        canary_percent=entry.canary_percent,
    )


def _external(entry: RouteEntry, proxy_for: ProxyFor) -> External:
    url = urlsplit(entry.base_url)
    host, default = url.hostname or "", 443 if url.scheme == "https" else 80
    port = url.port or default
    shown = f"[{host}]" if ":" in host else host
    return External(
        url=entry.base_url.removesuffix("/"),
        endpoint=Endpoint(host, port, url.scheme),
        host=(shown if port == default else f"{shown}:{port}").encode(),
        base_path=url.path.removesuffix("/").encode(),
        authorization=b"authorization: Bearer %b\r\n" % entry.api_key.encode() if entry.api_key else b"",
        forward_authorization=entry.forward_authorization,
        proxy=proxy_for(url.scheme, host, port),
    )
