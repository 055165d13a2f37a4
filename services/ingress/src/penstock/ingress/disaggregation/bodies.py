"""Bodies of requests as members of their top level, so that a protocol can set and drop some of them.

Values stay the bytes that the client sent; of a member that comes more than once the last counts, as with
engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

Members = Mapping[str, msgspec.Raw]

# Between gateway and engines only. From a client, the first kills a vLLM that decodes (its connector
# asserts) or reads what another request left; the others point an SGLang or TensorRT-LLM at a host of the
# client's choice.
FORBIDDEN = frozenset(
    {
        "kv_transfer_params",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "disagg_prefill_dp_rank",
        "disagg_prefill_resp",
        "disaggregated_params",
    }
)
# vLLM merges this object of a request into what its connector reads `kv_transfer_params` from.
ARGUMENTS = "vllm_xargs"
# Requests with one of these members, other than as given here, are not divided: decode would need what
# prefill computed beyond the KV cache, or would read the same blocks more than once.
WHOLE: Mapping[str, tuple[bytes, ...]] = {
    "n": (b"1", b"null"),
    "best_of": (b"1", b"null"),
    "use_beam_search": (b"false", b"null"),
    "echo": (b"false", b"null"),
    "prompt_logprobs": (b"null",),
    "prompt_embeds": (b"null",),
}
DIVIDED_PATHS = frozenset({b"/v1/chat/completions", b"/v1/completions"})

# Of a body whose members are told apart elsewhere; one with more is not divided.
MAX_MEMBERS = 256

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw()


_decode_answer = msgspec.json.Decoder(_PrefillAnswer).decode


class Edit(msgspec.Struct, frozen=True):
    """What becomes of a body: members to set, in plain JSON types, and those to leave out."""

    sets: dict[str, Any] = {}
    drops: frozenset[str] = frozenset()


def members(body: bytes | bytearray) -> Members:
    """The members of a body that was read as a JSON object before, less those of FORBIDDEN. Raises
    msgspec.DecodeError."""
    parts = {name: value for name, value in _decode(body).items() if name not in FORBIDDEN}
    if ARGUMENTS in parts:
        parts[ARGUMENTS] = _allowed(parts[ARGUMENTS])
    return parts


def _allowed(arguments: msgspec.Raw) -> msgspec.Raw:
    """An object without the members of FORBIDDEN; anything else as it is."""
    try:
        inner = _decode(arguments)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return arguments
    if FORBIDDEN.isdisjoint(inner):
        return arguments
    return msgspec.Raw(msgspec.json.encode({k: v for k, v in inner.items() if k not in FORBIDDEN}))


def places(body: bytes | bytearray) -> tuple[tuple[str, int, int], ...]:
    """Name, start and end of the members, for `members_at`; empty if there are too many, or one twice.

    Where a value's bytes stand earlier too, that place is as good. Raises msgspec.DecodeError."""
    parts = members(body)
    if len(parts) > MAX_MEMBERS:
        return ()
    found, end = [], 0
    for name, raw in parts.items():
        value = bytes(raw)
        start = body.find(value, end)
        if start < 0:
            return ()
        end = start + len(value)
        found.append((name, start, end))
    return tuple(found)


def members_at(body: bytes | bytearray, found: tuple[tuple[str, int, int], ...]) -> Members:
    """The members of a body that `places` has seen."""
    view = memoryview(body)
    return {name: msgspec.Raw(view[start:end]) for name, start, end in found}


def without_forbidden(body: bytes | bytearray) -> bytes:
    """The body less the members of FORBIDDEN, the very same if there are none. Raises msgspec.DecodeError."""
    parts = members(body)
    fields = _decode(body)
    if len(parts) == len(fields) and parts.get(ARGUMENTS) == fields.get(ARGUMENTS):
        return bytes(body)
    return msgspec.json.encode(parts)


def parameters_in(body: bytes) -> msgspec.Raw | None:
    """The `kv_transfer_params` of prefill's answer, if they are an object. Raises msgspec.DecodeError."""
    # As bytes of their own: a view would keep all of the answer.
    parameters = bytes(_decode_answer(body).kv_transfer_params)
    return msgspec.Raw(parameters) if parameters.startswith(b"{") else None


def divisible(path: bytes, parts: Members) -> bool:
    """Whether prefill and decode of such a request may be done by different instances."""
    if path not in DIVIDED_PATHS:
        return False
    return all(bytes(parts[name]) in plain for name, plain in WHOLE.items() if name in parts)


def edited(parts: Members, edit: Edit) -> bytes:
    """The body with an edit done, as JSON."""
    kept = {name: value for name, value in parts.items() if name not in edit.drops}
    return msgspec.json.encode({**kept, **edit.sets})
