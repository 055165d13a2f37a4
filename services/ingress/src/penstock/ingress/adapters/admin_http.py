"""The admin API on the admin listener (aiohttp)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from penstock.ingress.admin_messages import AdminRequest, AdminResponse
from penstock.ingress.failures import GatewayError

Handle = Callable[[AdminRequest], Awaitable[AdminResponse]]


def mount(app: web.Application, handle: Handle) -> None:
    """Answer everything by `handle` that `app` has no route for yet."""

    async def answer(request: web.Request) -> web.Response:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            error = GatewayError("request_too_large", "the body is larger than anything that is taken here")
            return web.Response(status=error.status, body=error.body(), content_type="application/json")
        response = await handle(
            AdminRequest(
                method=request.method,
                target=request.raw_path,
                headers={name.lower(): value for name, value in request.headers.items()},
                body=body,
                peer=request.remote or "",
            )
        )
        return web.Response(
            status=response.status,
            body=response.body,
            headers=response.headers,
            content_type="application/json",
        )

    app.router.add_route("*", "/{path:.*}", answer)
