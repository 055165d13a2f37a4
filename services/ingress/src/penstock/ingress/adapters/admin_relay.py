"""The admin API on the public port: a worker hands the request to its parent, which has the API."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import msgspec

from penstock.ingress.admin_messages import AdminRequest, AdminResponse
from penstock.ingress.failures import PHRASES, GatewayError
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.ports import Downstream
from penstock.ingress.responses import error_response

PREFIX = b"/admin/"
ANSWER_WITHIN_S = 15.0
MAX_BODY_BYTES = 256 * 1024
# Requests of one worker that its parent has in hand at a time.
MAX_WAITING = 16


class AdminCall(msgspec.Struct, frozen=True, tag="admin_call"):
    """A request on its way to the parent."""

    number: int
    request: AdminRequest


class AdminReply(msgspec.Struct, frozen=True, tag="admin_reply"):
    """Its answer on the way back."""

    number: int
    response: AdminResponse


class AdminRelay:
    """One worker's requests to the admin API."""

    def __init__(self, send: Callable[[AdminCall], Awaitable[None]]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, AdminExchange] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def start(
        self, downstream: Downstream, head: RequestHead, body: bytes | bytearray, request_id: str
    ) -> AdminExchange:
        """Ask the parent; the exchange answers `downstream`, at once or later."""
        exchange = AdminExchange(self, next(self._numbers), downstream, head, request_id)
        if len(body) > MAX_BODY_BYTES:
            text = f"a body has {MAX_BODY_BYTES} bytes at most here"
            exchange.fail_soon(GatewayError("request_too_large", text))
        elif len(self._waiting) >= MAX_WAITING:
            exchange.fail_soon(GatewayError("overloaded", "the admin API is busy", retry_after_s=1.0))
        else:
            self._waiting[exchange.number] = exchange
            call = AdminCall(exchange.number, _request_of(head, bytes(body), downstream.peer))
            task = asyncio.get_running_loop().create_task(self._ask(call), name="admin-call")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
            exchange.overdue = asyncio.get_running_loop().call_later(
                ANSWER_WITHIN_S, self._give_up, call.number, f"no answer within {ANSWER_WITHIN_S:g} s"
            )
        return exchange

    def answered(self, reply: AdminReply) -> None:
        """The parent answered."""
        exchange = self.forget(reply.number)
        if exchange is not None:
            exchange.answer(reply.response)

    def forget(self, number: int) -> AdminExchange | None:
        """It is waited for no longer; None if it was not."""
        exchange = self._waiting.pop(number, None)
        if exchange is not None and exchange.overdue is not None:
            exchange.overdue.cancel()
        return exchange

    async def _ask(self, call: AdminCall) -> None:
        try:
            await self._send(call)
        except OSError:
            self._give_up(call.number, "the gateway is shutting down")

    def _give_up(self, number: int, why: str) -> None:
        exchange = self.forget(number)
        if exchange is not None:
            exchange.fail(GatewayError("bus_unavailable", f"the admin API: {why}", retry_after_s=1.0))


class AdminExchange:
    """One request of a client's connection until it is answered."""

    def __init__(
        self, relay: AdminRelay, number: int, downstream: Downstream, head: RequestHead, request_id: str
    ) -> None:
        self.number = number
        self.overdue: asyncio.TimerHandle | None = None
        self._relay, self._downstream, self._head, self._request_id = relay, downstream, head, request_id
        self._done = False

    def client_gone(self) -> None:
        """The client left; what it asked for is done all the same."""
        self._done = True
        self._relay.forget(self.number)

    def pause(self) -> None:
        """Answers are small: nothing to hold back."""

    def resume(self) -> None:
        """See `pause`."""

    def answer(self, response: AdminResponse) -> None:
        """The answer came."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
        close = "" if self._head.keep_alive else "connection: close\r\n"
        head = (
            f"HTTP/1.1 {response.status} {PHRASES[response.status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(response.body)}\r\nx-request-id: {self._request_id}\r\n{lines}{close}\r\n"
        )
        self._finish(head.encode() + response.body)

    def fail(self, error: GatewayError) -> None:
        """There will be no answer."""
        self._finish(error_response(error, self._request_id, keep_alive=self._head.keep_alive))

    def fail_soon(self, error: GatewayError) -> None:
        """`fail` in a turn of its own, once the connection knows of this exchange."""
        asyncio.get_running_loop().call_soon(self.fail, error)

    def _finish(self, data: bytes) -> None:
        if not self._done:
            self._done = True
            self._downstream.write(data)
            self._downstream.exchange_done(self._head.keep_alive)


def _request_of(head: RequestHead, body: bytes, peer: str) -> AdminRequest:
    headers = {}
    for line in head.block.split(b"\r\n"):
        name, _, value = line.partition(b":")
        headers[name.decode("latin-1").lower()] = value.strip(b" \t").decode("utf-8", "replace")
    headers.pop("", None)
    return AdminRequest(
        method=head.method.decode("ascii", "replace"),
        target=head.origin_form.decode("ascii", "replace"),
        headers=headers,
        body=body,
        peer=peer,
        public=True,
    )
