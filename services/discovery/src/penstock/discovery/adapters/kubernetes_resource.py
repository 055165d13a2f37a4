"""One kind of object in one namespace: its address in the API, and its listing page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from penstock.common.codec import DecodeError, decode_record
from penstock.discovery.adapters.kubernetes_api import ApiFault, KubernetesApi
from penstock.discovery.kubernetes_objects import Page
from penstock.discovery.kubernetes_rules import Kind

GROUPS: Mapping[Kind, str] = {
    "pods": "/api/v1",
    "services": "/api/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
}
FORBIDDEN, GONE = 403, 410
# A page may take this many times the time for an answer's head.
PAGE_PATIENCE = 6


@dataclass(frozen=True)
class Target:
    """What is read. `namespace` is `*` for all, empty for the credentials' own."""

    kind: Kind
    namespace: str
    selector: str


@dataclass(frozen=True)
class Bounds:
    """What a source takes at most: a page of a listing is asked for again in smaller pieces, a watch with a
    longer line is left, more objects are not listed at all, failing requests wait this long at most."""

    page_bytes: int = 32 * 1024 * 1024
    # An object is at most 1.5 MiB in etcd; its JSON may be somewhat longer.
    line_bytes: int = 4 * 1024 * 1024
    objects: int = 10_000
    retry_s: float = 5.0


class Resource:
    """Asks the API about the objects of a target."""

    def __init__(
        self, api: KubernetesApi, target: Target, bounds: Bounds, *, timeout_s: float, page_size: int
    ) -> None:
        self.target, self.bounds = target, bounds
        self._api, self._timeout_s = api, timeout_s
        self._page_size = self._wanted_page_size = page_size

    @asynccontextmanager
    async def ask(self, verb: str, query: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200, its body unread. Raises ApiFault; for 403 it says what is missing."""
        kind = self.target.kind
        namespace = self.target.namespace or await self._api.namespace()
        path = (
            f"{GROUPS[kind]}/{kind}" if namespace == "*" else f"{GROUPS[kind]}/namespaces/{namespace}/{kind}"
        )
        if self.target.selector:
            query = {**query, "labelSelector": self.target.selector}
        try:
            async with self._api.get(path, query) as response:
                yield response
        except ApiFault as fault:
            if fault.status != FORBIDDEN:
                raise
            where = "in all namespaces" if namespace == "*" else f"in namespace {namespace}"
            raise ApiFault(
                f"forbidden (403): these credentials may not {verb} {kind} {where}; "
                f"a role with the verbs list and watch on {kind} is missing",
                status=FORBIDDEN,
            ) from fault

    async def list(self, take: Callable[[bytes], None]) -> str:
        """Hand all objects to `take`, as JSON; the version that a watch goes on from. Raises ApiFault."""
        more, count = "", 0
        while True:
            page = await self._page(more)
            items = page.items or ()
            count += len(items)
            if count > self.bounds.objects:
                raise ApiFault(
                    f"more than {self.bounds.objects} objects match: narrow --discovery-kubernetes-selector"
                )
            for item in items:
                take(bytes(item))
            more = page.metadata.next or ""
            if not more:
                self._page_size = self._wanted_page_size
                return page.metadata.resource_version

    async def _page(self, more: str) -> Page:
        try:
            async with asyncio.timeout(PAGE_PATIENCE * self._timeout_s):
                body = await self._body(
                    {"limit": str(self._page_size), **({"continue": more} if more else {})}
                )
            return decode_record(Page, body)
        except TimeoutError:
            raise ApiFault("a page of the listing takes too long") from None
        except (aiohttp.ClientError, OSError) as exc:
            raise ApiFault(f"a page of the listing is cut short ({type(exc).__name__})") from exc
        except DecodeError:
            raise ApiFault("the listing cannot be read: it is not JSON of the Kubernetes API") from None
        except ApiFault as fault:
            if fault.status == GONE and more:
                # Too much changed between two pages: the next attempt takes all at one go.
                self._page_size = self.bounds.objects
            raise

    async def _body(self, query: Mapping[str, str]) -> bytes:
        body = bytearray()
        async with self.ask("list", query) as response:
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > self.bounds.page_bytes:
                    self._page_size = max(1, self._page_size // 4)
                    raise ApiFault(f"a page of the listing is over {self.bounds.page_bytes} bytes")
        return bytes(body)
