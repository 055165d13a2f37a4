"""A copy as it goes to the shadow: where, which headers, which body."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from penstock.common.messages import MirrorCopy
from penstock.common.mirroring import MARK, MirrorConfig

_METHOD = re.compile(rb"[A-Z]{1,32}")
_TARGET = re.compile(rb"/[!-~]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
# Set here or by the client library; a copy does not carry them, whoever made it.
_OURS = frozenset({"host", "content-length", "transfer-encoding", "connection", "x-request-id"})
_body = msgspec.json.Decoder(dict[str, msgspec.Raw])


class UnusableCopy(Exception):
    """A copy that cannot be replayed; `reason` is a word of a closed set."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class ShadowRequest:
    """One request. The URL is as it goes out, nothing of it is to be encoded again."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


def shadow_request(copy: MirrorCopy, config: MirrorConfig) -> ShadowRequest:
    """What the shadow gets. Raises UnusableCopy: a copy comes from the bus and can be anything."""
    if not _METHOD.fullmatch(copy.method) or not _TARGET.fullmatch(copy.target):
        raise UnusableCopy("invalid")
    headers = [field for field in _fields(copy.headers) if field[0].lower() not in _OURS]
    if config.Authorization:
        headers = [field for field in headers if field[0].lower() != "authorization"]
        headers.append(("authorization", config.Authorization))
    headers += [("x-request-id", _plain(copy.request_id)), (MARK.decode(), _plain(copy.id))]
    body = _with_model(copy.body, config.RewriteModel) if config.RewriteModel else copy.body
    url = config.Target + copy.target.decode("ascii")
    return ShadowRequest(copy.method.decode("ascii"), url, tuple(headers), body)


def _fields(block: bytes) -> list[tuple[str, str]]:
    fields = []
    for line in block.split(b"\r\n")[:-1]:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise UnusableCopy("invalid")
        fields.append((match[1].decode("ascii"), _text(match[2].strip(b" \t"))))
    return fields


def _text(value: bytes) -> str:
    """Clients of HTTP write text as UTF-8: what is UTF-8 goes out as it came."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _plain(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise UnusableCopy("invalid")
    return text


def _with_model(body: bytes, model: str) -> bytes:
    """The body with another model and every other value as it was; a form is not rewritten."""
    try:
        fields = _body.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise UnusableCopy("no model to rewrite") from exc
    return msgspec.json.encode({**fields, "model": model})
