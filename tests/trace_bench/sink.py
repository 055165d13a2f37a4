"""`python -m trace_bench.sink PORT`: a collector that takes what comes and keeps nothing."""

from __future__ import annotations

import sys

from aiohttp import web


async def take(request: web.Request) -> web.Response:
    """Spans; read, and forgotten."""
    await request.read()
    return web.Response(content_type="application/x-protobuf")


async def well(request: web.Request) -> web.Response:
    """Ready."""
    return web.Response(text="")


def main() -> None:
    """Serve the port of the command line."""
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.add_routes([web.post("/v1/traces", take), web.get("/", well)])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
