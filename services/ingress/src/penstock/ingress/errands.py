"""Small requests of the gateway's own to engines, beside those of clients: what disaggregation has to ask
or to cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from penstock.common.model import Endpoint, Instance
from penstock.ingress.collecting import Collector
from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.ports import ResponseListener, Upstream, Upstreams

# More than the bootstrap server of a thousand ranks answers.
MAX_ANSWER_BYTES = 1024 * 1024
# One that is not answered by then is given up.
LIMIT_S = 5.0
# At one time; past it further ones are not sent.
MAX_ERRANDS = 1024

Done = Callable[[bytes], None]
Lost = Callable[[str], None]


class Errand:
    """One request; hears of its connection (`penstock.ingress.ports.UpstreamListener`)."""

    retry = False

    def __init__(
        self,
        wire: bytes,
        done: Done,
        lost: Lost,
        over: Callable[[], None],
    ) -> None:
        self._wire, self._done, self._lost, self._over = wire, done, lost, over
        self._upstream: Upstream | None = None
        self.open = True
        self._late = asyncio.get_running_loop().call_later(LIMIT_S, self._fail, f"no answer in {LIMIT_S:g} s")

    def upstream_waits(self, place: Upstream) -> None:
        """All connections are in use."""
        self._upstream = place

    def upstream_connected(self, upstream: Upstream) -> None:
        """Send it."""
        if not self.open:
            upstream.release()
            return
        self._upstream = upstream
        upstream.send(self._wire, b"")

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        """No connection."""
        self._fail(cause)

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """It closed the connection."""
        self._upstream = None
        self._fail(cause)

    def upstream_head(self, head: ResponseHead) -> ResponseListener | None:
        """Only a 200 is an answer."""
        if head.status != 200 or head.encoded:
            self._fail(f"it answered {head.status}")
            return None
        return Collector(head, MAX_ANSWER_BYTES, self._answered, self._fail)

    def close(self) -> None:
        """Nobody waits for it any more."""
        if not self.open:
            return
        self.open = False
        self._late.cancel()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()
        self._over()

    def _answered(self, body: bytes) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.release()
        if self.open:
            self.close()
            self._done(body)

    def _fail(self, cause: str) -> None:
        if self.open:
            self.close()
            self._lost(cause)


class Errands:
    """Those of one ingress process."""

    def __init__(self, upstreams: Upstreams, engine_key: str = "") -> None:
        """Engines' APIs are told `engine_key`, if there is one."""
        self._upstreams, self._count = upstreams, 0
        self._key = f"authorization: Bearer {engine_key}\r\n" if engine_key else ""

    def __len__(self) -> int:
        return self._count

    def get(
        self,
        instance: Instance,
        port: int,
        path: str,
        done: Done,
        lost: Lost,
    ) -> Errand | None:
        """Ask a port of an instance's host, which speaks plain HTTP; None if there are too many."""
        host = instance.endpoint.host
        beside = Instance(id=f"{instance.id}:{port}", endpoint=Endpoint(host, port))
        return self._send(beside, _head("GET", path, beside), done, lost)

    def post(self, instance: Instance, path: str, body: object, ended: Lost) -> Errand | None:
        """Tell an instance something; `ended` is told "" or why it did not hear of it."""
        data = msgspec.json.encode(body)
        more = f"{self._key}content-type: application/json\r\ncontent-length: {len(data)}\r\n"
        return self._send(instance, _head("POST", path, instance, more) + data, lambda _: ended(""), ended)

    def _send(
        self,
        instance: Instance,
        wire: bytes,
        done: Done,
        lost: Lost,
    ) -> Errand | None:
        if self._count >= MAX_ERRANDS:
            return None
        self._count += 1
        errand = Errand(wire, done, lost, self._ended)
        self._upstreams.acquire(instance, errand)
        return errand

    def _ended(self) -> None:
        self._count -= 1


def _head(method: str, path: str, instance: Instance, more: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: {instance.endpoint}\r\n{more}\r\n".encode()
