"""A response on its way to the client: its head held for its first bytes, framing followed, end kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.common.cells import HistogramCell
from penstock.common.response_tail import TAIL_BYTES, usage_in
from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import CHUNKED, LAST_CHUNK, UNTIL_CLOSE, ResponseHead
from penstock.ingress.in_flight import Work
from penstock.ingress.ports import Downstream, ResponseListener
from penstock.ingress.responses import client_head, last_event
from penstock.ingress.usage_filter import UsageFilter

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.gateway import Gateway


class Relay(ResponseListener):
    """Hears of one response's body (`penstock.ingress.ports.ResponseListener`), passes it on as it comes."""

    __slots__ = (
        *("_clean", "_clock", "_dechunker", "_downstream", "_filter", "_head", "_held", "_idle_s", "_last"),
        *("_owner", "_previous", "_usage", "_work", "bytes_out", "chunks", "first_byte_at"),
        *("_piece_at", "gaps"),
    )

    def __init__(
        self, owner: Exchange, downstream: Downstream, head: ResponseHead, gateway: Gateway, work: Work
    ) -> None:
        """`work` is told how many pieces there were."""
        self._owner, self._downstream, self._head, self._work = owner, downstream, head, work
        self._clock, self._idle_s = gateway.clock, gateway.stream_idle_timeout
        self.first_byte_at = 0.0
        self.bytes_out = self.chunks = 0
        self._held = self._last = self._previous = b""
        self._clean = True
        self._dechunker: ChunkedBody | None = None
        self._filter: UsageFilter | None = None
        self._usage: tuple[int, int, int] | None = None
        # Where the time between two pieces is counted, for some streams.
        self.gaps: HistogramCell | None = None
        self._piece_at = 0.0

    def dechunk(self) -> None:
        """Take the chunks apart, for a client that speaks HTTP/1.0; the connection's end is the body's."""
        self._dechunker = ChunkedBody(collect=True)

    def meter(self, *, hide: bool, chunked: bool) -> None:
        """Count the events of a stream; with `hide`, take the usage chunk out of it. `chunked`: the client
        takes chunks. Call it before `begin`."""
        head = self._head
        if head.event_stream and not head.encoded:
            self._filter = UsageFilter(hide=hide, chunked_in=head.length == CHUNKED, chunked_out=chunked)
            if hide:
                # It gets shorter, by how much is not known before its end.
                self._head = head.with_length(CHUNKED if chunked else UNTIL_CLOSE)
                self._dechunker = None

    def drop_limits(self) -> None:
        """Leave out what the head tells of limits of its sender's. Call it before `meter`."""
        self._head = self._head.unlimited()

    def begin(self, request_id: str, routing: bytes, *, keep_alive: bool) -> None:
        """Hold the head back until something of the body comes, or nothing is at hand."""
        self._owner.deadline = self._clock() + self._idle_s
        self._held = client_head(
            self._head, request_id, routing, dechunked=self._dechunker is not None, keep_alive=keep_alive
        )

    def touch(self) -> None:
        """Something went on: the time for the next piece begins."""
        self._owner.deadline = self._clock() + self._idle_s
        self._work.output_tokens = self.chunks

    def upstream_flush(self) -> None:
        """Send a head that came without any of its body."""
        if self._held:
            held, self._held = self._held, b""
            self._downstream.write(held)

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """Pass a piece on as it is."""
        if not self.first_byte_at:
            self.first_byte_at = self._clock()
            self._owner.response_began(self.first_byte_at)
        if self._filter is not None and not (data := self._filter.feed(data)):
            self.touch()
            return
        if self._dechunker is not None:
            self._dechunker.feed(data)
            data = bytes(self._dechunker.data)
            self._dechunker.data.clear()
            if not data:
                return
        self.bytes_out += len(data)
        if data != LAST_CHUNK:
            self.chunks += 1
            self._previous, self._last = self._last, data
        # What goes out of a filter is framed whole, wherever the piece ended.
        self._clean = boundary or (self._filter is not None and self._filter.hides)
        if self._held:
            # A write of its own for the head costs another system call, 8 us of the 80 of a request.
            data, self._held = self._held + data, b""
        else:
            self.touch()
            if self.gaps is not None:
                self._count_gap(self.gaps)
        self._downstream.write(data)

    def _count_gap(self, gaps: HistogramCell) -> None:
        now = self._clock()
        gaps.observe(now - (self._piece_at or self.first_byte_at))
        self._piece_at = now

    def upstream_done(self) -> None:
        """The response is complete."""
        self.upstream_flush()
        if self._filter is not None and (end := self._filter.end()):
            self._downstream.write(end)
        self._owner.response_done()

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """It broke off."""
        self._owner.response_lost(cause)

    def end_with(self, error: GatewayError) -> bytes | None:
        """End a stream with `error` as its last event: what was written, None if nothing can be said."""
        self.upstream_flush()
        event = None
        if self._clean:
            tail = (self._previous[-8:] + self._last)[-8:]
            event = last_event(self._head, tail, error, dechunked=self._dechunker is not None)
        if event is not None:
            self._downstream.write(event)
        return event

    def tail(self) -> bytes:
        """The end of what came."""
        tail = self._last
        if self._previous and len(tail) < TAIL_BYTES:
            tail = self._previous[-TAIL_BYTES:] + tail
        if self._filter is not None:
            tail += self._filter.hidden
        return tail[-TAIL_BYTES:] if len(tail) > TAIL_BYTES else tail

    @property
    def events(self) -> int:
        """Data events of a stream, counted with `meter`; else the pieces it came in."""
        return self.chunks if self._filter is None else self._filter.events

    def usage(self) -> tuple[int, int, int]:
        """(prompt, completion, cached) tokens as the response's end tells, once it came; 0 if it does not."""
        if self._usage is None:
            self._usage = usage_in(self.tail())
        return self._usage

    def reports_cache(self) -> bool:
        """Whether the engine names a number of cached tokens, be it 0."""
        # `in` costs machine code 0.2 us more.
        return self.tail().find(b'"cached_tokens"') >= 0
