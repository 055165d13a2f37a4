"""What the admin API takes and gives, whichever listener it came through."""

from __future__ import annotations

import msgspec


class AdminRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `target` is path and query as sent, header names are in lower case, `public` says that it
    came through the public port, `peer` is the client's address."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""
    peer: str = ""
    public: bool = False

    @property
    def path(self) -> str:
        """Without the query, escapes as they came."""
        return self.target.partition("?")[0]


class AdminResponse(msgspec.Struct, frozen=True):
    """One answer; its body is JSON. `headers` beside the content type and length."""

    status: int
    body: bytes
    headers: dict[str, str] = {}
