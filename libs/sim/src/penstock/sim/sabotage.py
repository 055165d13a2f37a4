"""Carries out faults on a connection: what `faults` describes, done with aiohttp's means."""

import asyncio
import socket
import struct
from typing import NoReturn

from aiohttp import web

from penstock.sim.faults import Fault
from penstock.sim.wire import ApiError

_GARBAGE = b"\x16\x03\x01\x00 no HTTP is spoken here \x00\xff\r\n\r\n"
_BROKEN_CHUNK = b"no chunk size\r\n\xff\xfe\r\n"
# SO_LINGER on, 0 s: closing sends a reset.
_LINGER_RESET = struct.pack("ii", 1, 0)


async def before_headers(request: web.BaseRequest, fault: Fault) -> None:
    """Strike before the first byte of the answer; returns if the request may go on.

    Raises ApiError for the faults that are answers; waits for cancellation, by the client's leaving, after
    those that leave nothing to answer.
    """
    match fault.kind:
        case "slow-start":
            await asyncio.sleep(fault.ms / 1000)
        case "429":
            raise ApiError(429, "RateLimitError", "Too many requests (simulated fault).")
        case "500":
            raise ApiError(500, "InternalServerError", "EngineCore encountered an issue (simulated fault).")
        case "hang-before-headers":
            await until_gone()
        case "refuse" | "drop-before-headers":
            await drop(request, reset=fault.reset)
        case "garbage":
            await spoil(request, _GARBAGE)


async def mid_body(request: web.BaseRequest, fault: Fault) -> NoReturn:
    """Strike after a part of the body was written."""
    if fault.kind == "drop-mid-stream":
        await drop(request, reset=fault.reset)
    if fault.kind == "garbage-mid-stream":
        await spoil(request, _BROKEN_CHUNK)
    await until_gone()


async def until_gone() -> NoReturn:
    """Wait to be cancelled, which is what the server does with a handler whose client has left."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nothing resolves this future")


async def drop(request: web.BaseRequest, *, reset: bool) -> NoReturn:
    """Close the connection after what is written, or at once with a reset."""
    transport = request.transport
    if transport is not None:
        if reset:
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            transport.abort()
        else:
            transport.close()
    await until_gone()


async def spoil(request: web.BaseRequest, data: bytes) -> NoReturn:
    if request.transport is not None:
        request.transport.write(data)
    await drop(request, reset=False)
