"""What clients get, in bytes: heads of instances' responses, errors of ours, and a stream's last event."""

from __future__ import annotations

from penstock.ingress.failures import PHRASES, GatewayError
from penstock.ingress.http_wire import CHUNKED, LAST_CHUNK, UNTIL_CLOSE, ResponseHead


def client_head(
    head: ResponseHead, request_id: str, routing: bytes, *, dechunked: bool, keep_alive: bool
) -> bytes:
    """An instance's head as its client gets it; `routing` are whole lines. `dechunked`: for HTTP/1.0."""
    framing = b""
    if head.length == CHUNKED:
        if not dechunked:
            framing = b"transfer-encoding: chunked\r\n"
    elif head.length >= 0 and head.status not in (204, 304):
        framing = b"content-length: %d\r\n" % head.length
    return b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\n%b%b\r\n" % (
        head.status,
        head.reason or PHRASES.get(head.status, "").encode(),
        head.block,
        framing,
        request_id.encode(),
        routing,
        b"" if keep_alive else b"connection: close\r\n",
    )


def error_response(
    error: GatewayError, request_id: str, *, keep_alive: bool, head_only: bool = False
) -> bytes:
    """An error of ours on the wire."""
    body = error.body()
    retry = f"retry-after: {max(1, round(error.retry_after_s))}\r\n" if error.retry_after_s else ""
    allow = f"allow: {error.allow}\r\n" if error.allow else ""
    asks = "www-authenticate: Bearer\r\n" if error.status == 401 else ""
    close = "" if keep_alive else "connection: close\r\n"
    head = (
        f"HTTP/1.1 {error.status} {PHRASES[error.status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
        f"{retry}{allow}{asks}{error.lines}{close}\r\n"
    )
    return head.encode() if head_only else head.encode() + body


def last_event(head: ResponseHead, tail: bytes, error: GatewayError, *, dechunked: bool) -> bytes | None:
    """What ends a stream whose response broke off, of which `tail` are the last bytes passed on; None if
    nothing can be said any more. A chunked one is whole with it: it has its last chunk."""
    chunked = head.length == CHUNKED and not dechunked
    if not head.event_stream or head.encoded or not (chunked or dechunked or head.length == UNTIL_CLOSE):
        return None
    if not _between_events(tail.removesuffix(b"\r\n") if chunked else tail):
        return None
    event = b"data: " + error.body() + b"\n\n"
    return b"%x\r\n%b\r\n%b" % (len(event), event, LAST_CHUNK) if chunked else event


def _between_events(tail: bytes) -> bool:
    return not tail or tail.endswith((b"\n\n", b"\r\n\r\n"))
