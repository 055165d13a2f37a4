"""Connections to instances are handed out only while they can serve."""

from typing import cast

from integration.servers import eventually

from penstock.common.model import Instance
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.ports import ResponseListener, Upstream

from .ingress_lab import Engine, Lab


class Listener:
    """Keeps what it is given; never sends anything."""

    retry = False

    def __init__(self) -> None:
        self.upstream: Upstream | None = None

    def upstream_connected(self, upstream: Upstream) -> None:
        self.upstream = upstream

    def upstream_waits(self, place: Upstream) -> None: ...

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        raise AssertionError(cause)

    def upstream_head(self, head: ResponseHead) -> ResponseListener:
        return self

    def upstream_flush(self) -> None: ...

    def upstream_data(self, data: bytes, boundary: bool) -> None: ...

    def upstream_done(self) -> None: ...

    def upstream_lost(self, cause: str, *, answered: bool) -> None: ...


async def connected(lab: Lab, instance: Instance) -> Upstream:
    listener = Listener()
    lab.upstreams.acquire(instance, listener)
    return await eventually(lambda: listener.upstream)


async def test_an_unused_connection_serves_the_next_request(lab: Lab, engine: Engine) -> None:
    (instance,) = lab.table.serving("m")
    upstream = await connected(lab, instance)
    first = upstream.reused
    upstream.release()
    assert await connected(lab, instance) is upstream
    assert (first, upstream.reused) == (False, True)
    upstream.abort()
    assert engine.connections == 1


async def test_a_connection_that_ended_in_this_turn_of_the_loop_is_not_handed_out(
    lab: Lab, engine: Engine
) -> None:
    (instance,) = lab.table.serving("m")
    upstream = await connected(lab, instance)
    upstream.release()
    # As the loop does when an idle connection speaks: it is broken, and its end comes a turn later.
    cast(EngineConnection, upstream).data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    listener = Listener()
    lab.upstreams.acquire(instance, listener)
    assert listener.upstream is not upstream
    fresh = await eventually(lambda: listener.upstream)
    assert fresh is not upstream
    assert not fresh.reused
    fresh.abort()
