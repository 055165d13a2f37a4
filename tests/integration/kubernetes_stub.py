"""A stub of the Kubernetes API, because no cluster runs where these tests run: list and watch as the API does
them, over HTTP, with their faults at hand.

Faithful in: pages with continue tokens of one snapshot, resource versions, watches from a version with events
of selector transitions, bookmarks, 410 as ERROR event or as status, 401, 403 and 404 with Status objects. A
watch from a version of the future is silent, as after a restored backup.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from integration.servers import free_port

Object = dict[str, Any]
KINDS = {"pods": "Pod", "services": "Service", "endpointslices": "EndpointSlice"}
_PATH = re.compile(r"/(?:api/v1|apis/discovery\.k8s\.io/v1)(?:/namespaces/([^/]+))?/([a-z]+)")
_IN = re.compile(r"(\S+)\s+(in|notin)\s+\((.*)\)")


@dataclass
class _Change:
    version: int
    kind: str
    before: Object | None
    after: Object | None


@dataclass
class Faults:
    """What the API does wrong while these are set."""

    frozen: bool = False
    """Requests are never answered, watches are silent."""
    silent: bool = False
    """Watches are opened and say nothing."""
    status: int = 0
    """Every request is answered so."""
    retry_after: str = ""
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """Pairs of verb and kind."""
    gone_as_status: bool = False
    """Expired versions are answered by status 410, not by an event."""
    expired_pages: int = 0
    """So many continue tokens are too old."""
    end_at_once: bool = False
    """Watches end as soon as they begin."""
    lines: list[bytes] = field(default_factory=list)
    """What the next watches send, one each, before they hang without another word."""
    body: bytes = b""
    """What a listing answers."""


class KubernetesStub:
    """One API server on loopback with a store of its own."""

    def __init__(self, *, token: str = "", tls: ssl.SSLContext | None = None) -> None:
        """`token` is asked for unless it is empty."""
        self.token, self._tls = token, tls
        self.port = free_port()
        self.faults = Faults()
        self.bookmark_s = 0.0
        self.requests: list[dict[str, str]] = []
        # Versions of the bookmarks sent.
        self.bookmarks: list[int] = []
        self._version = 100
        self._compacted = 0
        self._store: dict[tuple[str, str, str], Object] = {}
        self._history: list[_Change] = []
        self._snapshots: dict[str, list[Object]] = {}
        self._moved = asyncio.Condition()
        self._epoch = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def asked(self, verb: str) -> list[dict[str, str]]:
        """The queries of all requests of this verb, list or watch, in order."""
        return [query for query in self.requests if query["verb"] == verb]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls).start()

    async def stop(self) -> None:
        """Connections are cut, nobody listens."""
        await self.cut()
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def put(self, kind: str, *objects: Object) -> None:
        """Write or overwrite objects; the namespace is `default` unless they say another."""
        for given in objects:
            made = copy.deepcopy(given)
            meta = made.setdefault("metadata", {})
            meta.setdefault("namespace", "default")
            self._version += 1
            meta["resourceVersion"] = str(self._version)
            key = kind, meta["namespace"], meta["name"]
            self._history.append(_Change(self._version, kind, self._store.get(key), made))
            self._store[key] = made
        await self._wake()

    async def delete(self, kind: str, name: str, namespace: str = "default") -> None:
        gone = self._store.pop((kind, namespace, name))
        self._version += 1
        self._history.append(_Change(self._version, kind, gone, None))
        await self._wake()

    async def compact(self) -> None:
        """Versions so far expire."""
        self._compacted, self._history = self._version, []
        await self._wake()

    async def reset(self) -> None:
        """Everything is lost, versions begin anew, watches are cut."""
        self._store, self._history, self._snapshots = {}, [], {}
        self._version, self._compacted = 1, 0
        await self.cut()

    async def cut(self) -> None:
        """All watches break off."""
        self._epoch += 1
        await self._wake()

    async def _wake(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        found = _PATH.fullmatch(request.path)
        verb = "watch" if request.query.get("watch") in ("true", "1") else "list"
        if found is None or found[2] not in KINDS:
            return _status(404, "NotFound", "the server could not find the requested resource")
        namespace, kind = found[1] or "", found[2]
        self.requests.append({"verb": verb, "kind": kind, "namespace": namespace, **request.query})
        if self.faults.frozen:
            await self._until_cut()
        if self.faults.status:
            headers = {"Retry-After": self.faults.retry_after} if self.faults.retry_after else None
            return _status(self.faults.status, "Fault", "as told", headers)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        if (verb, kind) in self.faults.forbidden:
            return _status(403, "Forbidden", f'{kind} is forbidden: User "u" cannot {verb} resource "{kind}"')
        if verb == "list":
            return self._list(kind, namespace, request.query)
        return await self._watch(request, kind, namespace)

    def _list(self, kind: str, namespace: str, query: Any) -> web.Response:
        if self.faults.body:
            return web.Response(body=self.faults.body, content_type="application/json")
        limit, token = int(query.get("limit", "0")), query.get("continue", "")
        if token:
            if self.faults.expired_pages or token not in self._snapshots:
                self.faults.expired_pages -= 1
                return _status(410, "Expired", "The provided continue parameter is too old")
            items, version = self._snapshots.pop(token), token.split("/")[0]
        else:
            selector, version = query.get("labelSelector", ""), str(self._version)
            items = [o for key, o in sorted(self._store.items()) if _in(key[0], o, kind, namespace, selector)]
        page, rest = (items[:limit], items[limit:]) if limit else (items, [])
        meta: dict[str, Any] = {"resourceVersion": version}
        if rest:
            meta |= {"continue": f"{version}/{len(self.requests)}", "remainingItemCount": len(rest)}
            self._snapshots[meta["continue"]] = rest
        return web.json_response(
            {"kind": f"{KINDS[kind]}List", "apiVersion": "v1", "metadata": meta, "items": page}
        )

    async def _watch(self, request: web.Request, kind: str, namespace: str) -> web.StreamResponse:
        version, selector = int(request.query["resourceVersion"]), request.query.get("labelSelector", "")
        if version < self._compacted and self.faults.gone_as_status:
            return _status(410, "Expired", "too old resource version")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        # A connection that is cut ends without the last chunk, as when a server is killed.
        with contextlib.suppress(ConnectionError):
            if await self._stream(response, kind, namespace, selector, version):
                return response
        if request.transport:
            request.transport.abort()
        return response

    async def _stream(
        self, response: web.StreamResponse, kind: str, namespace: str, selector: str, version: int
    ) -> bool:
        """Send what happens from `version` on; whether the end is a clean one."""
        epoch = self._epoch
        if self.faults.lines:
            await response.write(self.faults.lines.pop(0))
            return await self._until_cut()
        while not self.faults.end_at_once:
            if version < self._compacted:
                await response.write(
                    _line("ERROR", _status_object(410, "Expired", "too old resource version"))
                )
                return True
            if not (self.faults.silent or self.faults.frozen):
                for change in [c for c in self._history if c.version > version]:
                    version = change.version
                    for line in _events(change, kind, namespace, selector):
                        await response.write(line)
            if await self._nothing_for(self.bookmark_s, version) and self._epoch == epoch:
                marked = {"kind": KINDS[kind], "metadata": {"resourceVersion": str(self._version)}}
                await response.write(_line("BOOKMARK", marked))
                version = max(version, self._version)
                self.bookmarks.append(version)
            if self._epoch != epoch:
                return False
        return True

    async def _nothing_for(self, seconds: float, version: int) -> bool:
        """Wait for a change; True if none came for `seconds` (0: for ever) and bookmarks are due."""
        async with self._moved:
            if self._version > version and not (self.faults.silent or self.faults.frozen):
                return False
            try:
                async with asyncio.timeout(seconds or None):
                    await self._moved.wait()
            except TimeoutError:
                return not (self.faults.silent or self.faults.frozen)
        return False

    async def _until_cut(self) -> bool:
        epoch = self._epoch
        async with self._moved:
            await self._moved.wait_for(lambda: self._epoch != epoch)
        return False


def _events(change: _Change, kind: str, namespace: str, selector: str) -> Iterator[bytes]:
    """The change as seen through a selector: entering it is ADDED, leaving it DELETED."""
    before = change.before is not None and _in(change.kind, change.before, kind, namespace, selector)
    after = change.after is not None and _in(change.kind, change.after, kind, namespace, selector)
    if after:
        yield _line("MODIFIED" if before else "ADDED", change.after)
    elif before:
        last = copy.deepcopy(change.after or change.before)
        assert last is not None
        last["metadata"]["resourceVersion"] = str(change.version)
        yield _line("DELETED", last)


def _line(kind: str, made: Object | None) -> bytes:
    return json.dumps({"type": kind, "object": made}).encode() + b"\n"


def _in(stored: str, made: Object, kind: str, namespace: str, selector: str) -> bool:
    meta = made["metadata"]
    labels = meta.get("labels") or {}
    wanted = re.findall(r"(?:[^,(]|\([^)]*\))+", selector)
    here = stored == kind and namespace in ("", meta["namespace"])
    return here and all(_matches(one.strip(), labels) for one in wanted)


def _matches(requirement: str, labels: dict[str, str]) -> bool:
    if found := _IN.fullmatch(requirement):
        values = {value.strip() for value in found[3].split(",")}
        return (labels.get(found[1]) in values) is (found[2] == "in")
    if requirement.startswith("!"):
        return requirement[1:].strip() not in labels
    key, sign, value = re.fullmatch(r"([^=!]+?)\s*(?:(==?|!=)\s*(.*))?", requirement).groups()  # type: ignore[union-attr]
    if not sign:
        return key in labels
    return (labels.get(key) == value) is (sign != "!=")


def _status_object(code: int, reason: str, message: str) -> Object:
    return {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}


def _status(code: int, reason: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(_status_object(code, reason, message), status=code, headers=headers)
