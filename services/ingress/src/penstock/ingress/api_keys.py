"""API keys: who asks, and for which models they may. Only hashes of keys are held, here and at rest.

No key is kept beyond the connection that it came on. A key is looked up by its SHA-256, which nobody can
choose: how long a look-up takes says nothing about the keys that there are.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC
from hashlib import sha256
from typing import Annotated, Any

import msgspec
import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from penstock.common.followed_file import MAX_FILE_BYTES
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import HeadMemo, RequestHead
from penstock.ingress.limit_settings import MAX_REQUESTS, MAX_TOKENS
from penstock.ingress.limits import Part, parts_of

# In the place of a file: the live configuration's keys are all there are.
LIVE = "live"
# Longer ones are no keys; the header's bound is far above it.
MAX_KEY_BYTES = 1024
_SHOWN_FAULTS = 8
_CREDENTIALS = re.compile(rb"^(?:authorization|x-api-key):[^\n]*\n", re.I | re.M)

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class BadKeys(ValueError):
    """Keys that cannot be used; the message names field and reason, never a value that could be a key."""


class ApiKey(BaseModel):
    """One key, or several of one holder while one takes the place of another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hashes: Annotated[tuple[Hash, ...], Field(min_length=1, max_length=16)] = Field(
        description="SHA-256 of each key that is good, 64 hexadecimal digits in lower case"
    )
    owner: Text = Field(description="whose it is: the user whose limits count")
    models: Annotated[tuple[Text, ...], Field(max_length=1024)] | None = Field(
        None, description="models it may ask for; left out: all"
    )
    rpm: int = Field(0, ge=0, le=MAX_REQUESTS, description="requests per minute with it; 0: no limit")
    tpm: int = Field(0, ge=0, le=MAX_TOKENS, description="tokens per minute with it; 0: no limit")
    expires_at: AwareDatetime | None = Field(
        None, description="when it ends, ISO 8601 with its offset; left out: never"
    )


class Caller(msgspec.Struct, frozen=True):
    """Who a key belongs to. `expires_at` in seconds since 1970; `models` None for all; `counts` are those of
    its own limits, beside its owner's."""

    key: str
    owner: str
    models: frozenset[str] | None = None
    expires_at: float = float("inf")
    counts: tuple[Part, ...] = ()

    def may(self, model: str) -> bool:
        """Whether the model may be asked for."""
        return self.models is None or model in self.models

    def require(self, model: str) -> None:
        """Raises GatewayError for a model that may not be asked for: as if there were none."""
        if not self.may(model):
            text = f"The model '{model}' does not exist, or this API key may not use it."
            raise GatewayError("model_not_found", text, param="model")


class ApiKeys:
    """The keys of all sources; an earlier source's counts where two have the same hash."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is the time of day, in seconds since 1970."""
        self._clock = clock
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}
        # Whether a key has limits of its own.
        self.limited = False

    def __len__(self) -> int:
        return len(self._callers)

    def replace(self, sources: Iterable[Mapping[str, ApiKey]]) -> None:
        """These are all keys from here on."""
        callers: dict[bytes, tuple[bytes, Caller]] = {}
        for source in sources:
            for name, key in source.items():
                ends = key.expires_at.astimezone(UTC).timestamp() if key.expires_at else float("inf")
                models = frozenset(key.models) if key.models is not None else None
                counts = tuple(parts_of(f"k{len(name)}:{name}", "API key", key.rpm, key.tpm))
                caller = Caller(name, key.owner, models, ends, counts)
                for text in key.hashes:
                    digest = bytes.fromhex(text)
                    callers.setdefault(digest, (digest, caller))
        self._callers = callers
        self.limited = any(caller.counts for _, caller in callers.values())

    def known(self, head: RequestHead, memo: HeadMemo[RequestHead]) -> RequestHead | None:
        """The request as it goes on, if its key is that of the head like it that `memo` remembers, and still
        good; its `length` may be another."""
        if memo.admitted is None:
            return None
        read, callers, admitted = memo.admitted
        caller = admitted.caller
        if read is not head.read or callers is not self._callers or caller is None:
            return None
        return admitted if caller.expires_at > self._clock() else None

    def admit(self, head: RequestHead, memo: HeadMemo[RequestHead] | None = None) -> RequestHead:
        """The request as it goes on: with its caller, and without the key. `memo` parsed it: a head like the
        one before it on its connection has the same key, whose hash costs 5 us.

        Raises:
            GatewayError: it has no key that is good.
        """
        if memo is not None and (known := self.known(head, memo)) is not None:
            return known.with_length(head.length)
        key = _key_of(head.read)
        if not key:
            text = "an API key is required: authorization: Bearer ..."
            raise GatewayError("invalid_api_key", text, param="authorization")
        digest = sha256(key).digest()
        found = self._callers.get(digest)
        if found is None or not hmac.compare_digest(found[0], digest):
            raise GatewayError("invalid_api_key", "incorrect API key provided", param="authorization")
        caller = found[1]
        if caller.expires_at <= self._clock():
            raise GatewayError("invalid_api_key", "the API key has expired", param="authorization")
        admitted = head.of(caller, _CREDENTIALS.sub(b"", head.block))
        if memo is not None and memo.remembers:
            memo.admitted = head.read, self._callers, admitted
        return admitted


def read_keys(data: bytes) -> Mapping[str, ApiKey]:
    """The keys of a file by name, from YAML (or JSON). Raises BadKeys with all faults."""
    if len(data) > MAX_FILE_BYTES:
        raise BadKeys(f"it is over {MAX_FILE_BYTES} bytes")
    try:
        content = yaml.safe_load(data.decode())
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        # What the parser says may quote the line.
        raise BadKeys("it is no YAML") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadKeys(f"it must hold a mapping of names, holds a {type(content).__name__}")
    keys, faults = {}, []
    for name, value in content.items():
        try:
            if not isinstance(name, str) or not 0 < len(name) <= 512:
                raise BadKeys("a name is text of 1 to 512 characters")
            keys[name] = read_key(value)
        except BadKeys as exc:
            faults.append(f"{str(name)[:80]!r}: {exc}")
    if faults:
        raise BadKeys("; ".join(faults[:_SHOWN_FAULTS]))
    return keys


def read_key(value: Any) -> ApiKey:
    """One key, from plain types. Raises BadKeys."""
    try:
        return ApiKey.model_validate(value)
    except ValidationError as exc:
        faults = exc.errors(include_input=False, include_context=False, include_url=False)
        texts = [f"{'.'.join(map(str, one['loc'])) or 'key'}: {one['msg']}" for one in faults]
        raise BadKeys(", ".join(texts[:_SHOWN_FAULTS])) from None


def _key_of(read: Mapping[bytes, bytes]) -> bytes:
    """The bearer token, else `x-api-key` as Anthropic's clients send it; empty without either."""
    scheme, _, token = read.get(b"authorization", b"").partition(b" ")
    key = token.strip() if scheme.lower() == b"bearer" else b""
    key = key or read.get(b"x-api-key", b"")
    return key if len(key) <= MAX_KEY_BYTES else b""
