"""Finds a request's operation, and makes an answer of whatever comes of it: never a 500 or a traceback."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import BaseModel
from pydantic_core import to_json

from penstock.common.config_keeping import VersionConflict
from penstock.common.errors import BusError, MessageTooLarge
from penstock.ingress.admin.access import Access
from penstock.ingress.admin.operations import MAX_BODY_BYTES, Answer, Operation, segments_of
from penstock.ingress.admin_messages import AdminRequest, AdminResponse
from penstock.ingress.failures import GatewayError

log = logging.getLogger(__name__)


class Router:
    """The admin API as a whole."""

    def __init__(self, operations: Sequence[Operation], access: Access) -> None:
        self.operations, self._access = tuple(operations), access

    async def handle(self, request: AdminRequest) -> AdminResponse:
        """Answer a request; never raises."""
        try:
            answer = await self._answer(request)
            head_only = request.method == "HEAD"
            return AdminResponse(answer.status, b"" if head_only else encode(answer))
        except GatewayError as exc:
            return _refusal(exc)
        except VersionConflict as exc:
            return _refusal(GatewayError("version_conflict", str(exc), param="expected_version"))
        except MessageTooLarge as exc:
            text = f"it has {exc.size_bytes} bytes with what is kept beside it, at most {exc.limit_bytes} fit"
            return _refusal(GatewayError("request_too_large", text))
        except BusError as exc:
            return _refusal(GatewayError("bus_unavailable", f"the bus: {exc}", retry_after_s=1.0))
        except Exception:
            # A fault of this program is told to nobody outside, and costs this request only.
            log.exception("the admin API failed")
            return _refusal(GatewayError("internal_error", "the gateway could not handle the request"))

    async def _answer(self, request: AdminRequest) -> Answer:
        by = self._access.check(request)
        if len(request.body) > MAX_BODY_BYTES:
            raise GatewayError("request_too_large", f"a body has {MAX_BODY_BYTES} bytes at most")
        segments = segments_of(request.path)
        found = [(op, params) for op in self.operations if (params := op.match(segments)) is not None]
        if not found:
            raise GatewayError("not_found", f"there is no {request.path[:200]} here")
        method = "GET" if request.method == "HEAD" else request.method
        for operation, params in found:
            if operation.method == method:
                return await operation.handler(operation.call(request, params, by))
        allowed = ", ".join(operation.method for operation, _ in found)
        text = f"{request.method[:40]} is not allowed here, use {allowed}"
        raise GatewayError("method_not_allowed", text, allow=allowed)


def encode(answer: Answer) -> bytes:
    """An answer's body."""
    content = answer.content
    if isinstance(content, BaseModel):
        return content.model_dump_json().encode()
    return to_json(dict(content))


def _refusal(error: GatewayError) -> AdminResponse:
    headers = {}
    if error.allow:
        headers["allow"] = error.allow
    if error.retry_after_s:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return AdminResponse(error.status, error.body(), headers)
