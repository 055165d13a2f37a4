"""Which owner's instances of a model a request wants (seed 004).

Body before header before query; in each of them `owned_by` before `engine` before `inference_server`.
Empty, blank and null say nothing. Owners are compared without regard to case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import msgspec

from penstock.ingress.failures import GatewayError

if TYPE_CHECKING:
    # Not at run time: it would bring asyncio into the helper that reads large bodies, 9 MB of its 18.
    from penstock.common.instances import InstanceTable

NAMES = ("owned_by", "engine", "inference_server")
HEADERS = (b"x-owned-by", b"x-engine", b"x-inference-server")
# Where the head's reader leaves what the query says, among the headers; no header has such a name.
IN_QUERY = b"?owned_by"
MAX_OWNER = 512
MAX_LISTED = 20
_MAX_KNOWN = 8192
_QUERY_NAMES = {name.encode() for name in NAMES}
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def said_in_body(*values: msgspec.Raw) -> str:
    """The owner by the raw values of the fields NAMES. Raises GatewayError that names the field."""
    found = ""
    for name, value in zip(NAMES, values, strict=True):
        owner = _text(name, value) if len(value) else ""
        found = found or owner
    return found


def _text(name: str, value: msgspec.Raw) -> str:
    try:
        owner = msgspec.json.decode(value, type=str | None) or ""
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise GatewayError("invalid_request", f"'{name}' must be a string", param=name) from None
    if len(owner) > MAX_OWNER:
        raise GatewayError("invalid_request", f"'{name}' has {MAX_OWNER} characters at most", param=name)
    return owner.strip()


def without_owner(body: bytes | bytearray) -> bytes:
    """A JSON object without the fields that only the gateway reads; other values stay byte for byte."""
    fields = _fields(body)
    for name in NAMES:
        fields.pop(name, None)
    return msgspec.json.encode(fields)


def split_query(origin_form: bytes) -> tuple[bytes, bytes]:
    """What a query says of the owner, and path and query without that."""
    path, _, query = origin_form.partition(b"?")
    said: dict[bytes, bytes] = {}
    kept = []
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name in _QUERY_NAMES:
            said[name] = unquote_to_bytes(value.replace(b"+", b" ")).strip()
        else:
            kept.append(part)
    if not said:
        return b"", origin_form
    owner = next((said[name.encode()] for name in NAMES if said.get(name.encode())), b"")
    return owner, path + (b"?" + b"&".join(kept) if kept else b"")


def said_in_head(read: Mapping[bytes, bytes]) -> str:
    """The owner by headers and query. Raises GatewayError for a text that is too long."""
    for name in (*HEADERS, IN_QUERY):
        value = read.get(name)
        if value:
            shown = name.decode().lstrip("?")
            if len(value) > MAX_OWNER:
                text = f"{shown} has {len(value)} bytes, at most {MAX_OWNER} are taken"
                raise GatewayError("invalid_request", text, param=shown)
            owner = value.decode("utf-8", "replace").strip()
            if owner:
                return owner
    return ""


class Owners:
    """Who serves which model, as the instance table has it."""

    def __init__(self, table: InstanceTable) -> None:
        self._table = table
        self._known: dict[tuple[str, str], str] = {}
        self._version = -1

    def resolve(self, model: str, owner: str) -> str:
        """The owner as the model's instances spell it. Raises GatewayError that lists those there are."""
        if self._version != self._table.version or len(self._known) >= _MAX_KNOWN:
            self._known.clear()
            self._version = self._table.version
        key = model, owner
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._find(model, owner)
        return known

    def _find(self, model: str, owner: str) -> str:
        owners = sorted({instance.owned_by(model) for instance in self._table.serving(model)} - {""})
        if owner in owners:
            return owner
        for one in owners:
            if one.lower() == owner.lower():
                return one
        text = f"The model '{model}' is not served by owner '{owner}'; {_listed('owners', owners)}"
        raise GatewayError("model_not_found", text, param="owned_by")

    def unknown_model(self, model: str) -> GatewayError:
        """The answer to a model that nobody serves."""
        text = f"The model '{model}' does not exist; {_listed('models', sorted(self._table.models()))}"
        return GatewayError("model_not_found", text, param="model")


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return f"there are no {what}"
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{what}: {', '.join(names[:MAX_LISTED])}{more}"
