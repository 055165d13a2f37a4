"""The shadow over HTTP, with aiohttp: nothing of what it says or does reaches further than its own copy."""

from __future__ import annotations

import asyncio
import time

import aiohttp
from yarl import URL

from penstock.common.response_tail import TAIL_BYTES, finish_reason_in, usage_in
from penstock.common.routing_events import ResponseFigures
from penstock.mirror.ports import ShadowFailed
from penstock.mirror.shadow_request import ShadowRequest

CONNECT_TIMEOUT_S = 3.0
READ_BYTES = 64 * 1024
# A response that does not end by itself, ends here.
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
# aiohttp would add them: a copy has the headers of its request.
_NOT_ADDED = frozenset({"Accept", "Accept-Encoding", "User-Agent", "Content-Type"})


class ShadowClient:
    """Fulfils `ports.Shadow`. Certificates are verified, redirects not followed, cookies not kept, bodies not
    unpacked."""

    def __init__(self, max_connections: int, max_response_bytes: int = MAX_RESPONSE_BYTES) -> None:
        self._max_connections, self._max_response_bytes = max_connections, max_response_bytes
        self._session: aiohttp.ClientSession | None = None

    async def send(self, request: ShadowRequest, timeout_s: float) -> ResponseFigures:
        """As the port says; `timeout_s` counts from here."""
        started_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._send(request, started_at)
        except aiohttp.ConnectionTimeoutError as exc:
            raise ShadowFailed("unreachable", f"no connection within {CONNECT_TIMEOUT_S:g} s") from exc
        except TimeoutError:
            # An OSError too; the port's own word.
            raise
        except aiohttp.ClientConnectorError as exc:
            raise ShadowFailed("unreachable", str(exc)) from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise ShadowFailed("broken", type(exc).__name__) from exc

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()

    async def _send(self, request: ShadowRequest, started_at: float) -> ResponseFigures:
        first_at, size, tail = 0.0, 0, b""
        async with self._opened().request(
            request.method,
            URL(request.url, encoded=True),
            headers=list(request.headers),
            data=request.body,
            allow_redirects=False,
        ) as response:
            while piece := await response.content.read(READ_BYTES):
                first_at = first_at or time.monotonic()
                size += len(piece)
                tail = (tail + piece)[-TAIL_BYTES:]
                if size > self._max_response_bytes:
                    raise ShadowFailed(
                        "oversize", f"a response of more than {self._max_response_bytes} bytes"
                    )
            status = response.status
        return ResponseFigures(
            status,
            _ms(started_at, first_at),
            _ms(started_at, time.monotonic()),
            size,
            usage_in(tail)[1],
            finish_reason_in(tail),
        )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                skip_auto_headers=_NOT_ADDED,
                auto_decompress=False,
            )
        return self._session


def _ms(start: float, end: float) -> float:
    return int((end - start) * 1e6) / 1000 if end else 0.0
