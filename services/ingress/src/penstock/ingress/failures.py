"""Every way the ingress refuses or fails a request: the only map from codes to HTTP (DESIGN 3.2)."""

from __future__ import annotations

import msgspec

from penstock.common.messages import Reason

# code -> (status, OpenAI's error type)
CODES: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "bad_framing": (400, "invalid_request_error"),
    "invalid_strategy": (400, "invalid_request_error"),
    "invalid_profile": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "invalid_admin_token": (401, "authentication_error"),
    "forbidden": (403, "permission_error"),
    "model_not_found": (404, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "version_conflict": (409, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "headers_too_large": (431, "invalid_request_error"),
    "limits_unavailable": (503, "api_error"),
    "no_available_instance": (503, "overloaded_error"),
    "overloaded": (503, "overloaded_error"),
    "shutting_down": (503, "overloaded_error"),
    "bus_unavailable": (503, "api_error"),
    "internal_error": (503, "api_error"),
    "upstream_unreachable": (502, "api_error"),
    "upstream_timeout": (504, "api_error"),
}

PHRASES = {
    200: "OK",
    201: "Created",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

REJECTIONS = {
    Reason.UNKNOWN_MODEL: "model_not_found",
    Reason.NO_INSTANCE: "no_available_instance",
    Reason.SATURATED: "overloaded",
    Reason.BAD_STRATEGY: "invalid_strategy",
    Reason.BAD_REQUEST: "invalid_request",
    Reason.BAD_PROFILE: "invalid_profile",
}

# What of a request a refusal is about: a field or a header.
PARAMS = {
    "model_not_found": "model",
    "invalid_strategy": "routing-strategy",
    "invalid_profile": "config-profile",
}


class GatewayError(Exception):
    """A request that gets an error of ours; `code` is a key of CODES."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float = 0.0,
        allow: str = "",
        status: int = 0,
        lines: str = "",
    ) -> None:
        """`allow`: the methods that the path takes, for a 405. `status`: not the code's usual one. `lines`:
        further header lines, whole."""
        self.code, self.message, self.param, self.retry_after_s = code, message, param, retry_after_s
        self.allow, self._status, self.lines = allow, status, lines
        super().__init__(f"{code}: {message}")

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._status or CODES[self.code][0]

    def body(self) -> bytes:
        """The JSON body of DESIGN 3.2."""
        error = {
            "message": self.message,
            "type": CODES[self.code][1],
            "code": self.code,
            "param": self.param,
        }
        return msgspec.json.encode({"error": error})
