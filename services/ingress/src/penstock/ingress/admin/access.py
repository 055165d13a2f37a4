"""Who may use the admin API: a bearer token, or, without one, programs on this machine."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from penstock.common.settings import is_loopback
from penstock.ingress.admin_messages import AdminRequest
from penstock.ingress.failures import GatewayError

# Who says to be whom; kept with the change, and not verified.
CALLER_HEADER = "x-admin-user"
_CALLER = re.compile(r"[A-Za-z0-9._@+-]{1,64}")


class Access:
    """Lets requests in. `token` is asked each time, so that a file with a fresh one needs no restart."""

    def __init__(self, token: Callable[[], str]) -> None:
        """`token()` is empty where none is set."""
        self._token = token

    def check(self, request: AdminRequest) -> str:
        """Who asks, as far as is known. Raises GatewayError."""
        token = self._token()
        if token:
            self._check_token(request, token)
        elif request.public:
            raise GatewayError("not_found", "there is no admin API here")
        else:
            _check_local(request)
        caller = request.headers.get(CALLER_HEADER, "")
        if caller and not _CALLER.fullmatch(caller):
            text = "1 to 64 letters, digits and . _ @ + - are taken"
            raise GatewayError("invalid_request", text, param=CALLER_HEADER)
        return f"{caller or 'admin'} at {request.peer or 'an unknown address'}"

    def _check_token(self, request: AdminRequest, token: str) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Digests of equal length: neither the length nor the place of the first difference shows in the time.
        same = hmac.compare_digest(_digest(given.strip()), _digest(token))
        if scheme.lower() != "bearer" or not same:
            text = "the admin API needs its token: authorization: Bearer ..."
            raise GatewayError("invalid_admin_token", text, param="authorization")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _check_local(request: AdminRequest) -> None:
    """Without a token a web page in somebody's browser must not get in: neither by a name that resolves to
    this machine, nor from another origin."""
    host = request.headers.get("host", "")
    name = _host_of(f"//{host}")
    if name is None or not is_loopback(name):
        text = "without --admin-token the admin API answers to localhost and 127.0.0.1 only"
        raise GatewayError("forbidden", text, param="host")
    origin = request.headers.get("origin")
    if origin is not None and _netloc_of(origin) != host:
        raise GatewayError("forbidden", "requests of other origins need --admin-token", param="origin")


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _netloc_of(url: str) -> str | None:
    """`host:port` of an origin; None if it is none."""
    try:
        return urlsplit(url).netloc or None
    except ValueError:
        return None
