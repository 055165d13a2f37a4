"""One client that sends hostile bodies, over and over, while others are measured."""

from __future__ import annotations

import asyncio
import re
from collections import Counter

from penstock.cli.bench.clients import Address, Tally
from penstock.cli.bench.window import PATIENCE_S
from penstock.cli.bench.wire import head

# Between two beginnings: what a body costs the load generator and the engine stays a small share.
EVERY_S = 0.1
# Both are an answer: the body is relayed, or it is refused.
_DEFINED = re.compile(rb"HTTP/1\.1 (2..|4..) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9})\r\n", re.IGNORECASE)
_LAST = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)


class Attack:
    """Bodies on their way to one address, and the statuses that answered them."""

    def __init__(self, address: Address, body: bytes, headers: str, tally: Tally) -> None:
        self._address, self._tally = address, tally
        self._head, self._body = head(len(body), headers), body
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.statuses: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                next_at = loop.time() + EVERY_S
                await self._once()
                await asyncio.sleep(next_at - loop.time())
        finally:
            self._hang_up()

    async def _once(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self._send()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as exc:
            self._tally.fail(f"no answer to a hostile body: {exc!r}")
            self._hang_up()
            return
        if not _DEFINED.match(answer):
            self._tally.fail(f"a hostile body was answered with {answer[:80]!r}")
        self.statuses[answer[9:12].decode("latin-1")] += 1

    async def _send(self) -> bytes:
        """The head of the answer, after the whole answer came."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(self._head)
        writer.write(self._body)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(answer)
        if length is None:
            raise EOFError(f"an answer without content-length: {answer[:80]!r}")
        await reader.readexactly(int(length[1]))
        if _LAST.search(answer):
            self._hang_up()
        return answer

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
