"""Which requests are copied to a shadow, and what of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from penstock.common.mirroring import MARK, MirrorConfig

# Headers that a client proves itself with.
CREDENTIALS = frozenset(
    {
        b"authorization",
        b"cookie",
        b"x-api-key",
        b"api-key",
        b"x-auth-token",
        b"x-access-token",
        b"x-goog-api-key",
        b"x-amz-security-token",
        b"ocp-apim-subscription-key",
    }
)
_QUERY_CREDENTIALS = re.compile(rb"(?<=[?&])(?:api[-_]?key|key|access_token|token)=[^&]*(?:&|\Z)", re.I)
# What one request more owes is a hundredth of `Ratio`; starting half way makes the count the nearest one.
_WHOLE, _HALF = 100.0, 50.0
_NONE: Mapping[bytes, bytes] = MappingProxyType({})


class Sampler:
    """Takes `Ratio` of a hundred matching requests, to within one at any time."""

    def __init__(self) -> None:
        self._owed = _HALF

    def takes(
        self, config: MirrorConfig, model: str, block: bytes, read: Mapping[bytes, bytes] = _NONE
    ) -> bool:
        """Whether this request is copied; `block` are the header lines that are passed on, `read` holds those
        that end here too."""
        if config.Models and model not in config.Models:
            return False
        if config.Headers and not _matches(config.Headers, block, read):
            return False
        if b"\n" + MARK + b":" in b"\n" + block.lower():
            # A target that leads back to this gateway would have each copy copied, without an end.
            return False
        self._owed += config.Ratio
        if self._owed < _WHOLE:
            return False
        self._owed -= _WHOLE
        return True


def _matches(wanted: dict[str, str], block: bytes, read: Mapping[bytes, bytes]) -> bool:
    """Whether each header is there with its value; an empty value stands for any."""
    held = {name.decode("latin-1"): {value.decode("latin-1")} for name, value in read.items()}
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        held.setdefault(name.decode("ascii").lower(), set()).add(value.strip(b" \t").decode("latin-1"))
    return all(name in held and (not value or value in held[name]) for name, value in wanted.items())


def without_credentials(block: bytes) -> bytes:
    """Header lines less those that a client proves itself with."""
    lines = block.split(b"\r\n")[:-1]
    kept = [line for line in lines if line.partition(b":")[0].lower() not in CREDENTIALS]
    return b"\r\n".join((*kept, b"")) if kept else b""


def target_without_credentials(target: bytes) -> bytes:
    """Path and query less the parameters that usually carry keys."""
    if b"?" not in target:
        return target
    kept, found = _QUERY_CREDENTIALS.subn(b"", target)
    return kept.rstrip(b"?&") if found else target
