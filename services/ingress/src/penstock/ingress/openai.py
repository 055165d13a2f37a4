"""Request bodies -> InferenceRequest. Only the top level of a body is parsed; prompts stay bytes."""

from __future__ import annotations

import itertools
import re
from typing import Final

import msgspec

from penstock.ingress.disaggregation.bodies import ARGUMENTS, FORBIDDEN, without_forbidden
from penstock.ingress.failures import GatewayError
from penstock.ingress.owners import said_in_body, without_owner
from penstock.ingress.request_body import Body, InferenceRequest, Named

MAX_MODEL_LENGTH: Final = 512
# Each costs another look at the whole body.
MAX_MODEL_PLACES: Final = 4

# Path -> the field that holds the prompt (None: nothing to hash), and whether it must be there.
GENERATION_PATHS: dict[bytes, tuple[str | None, bool]] = {
    b"/v1/chat/completions": ("messages", True),
    b"/v1/completions": ("prompt", True),
    b"/v1/embeddings": ("input", True),
    b"/v1/responses": ("input", True),
    b"/v1/messages": ("messages", True),
    b"/v1/rerank": ("documents", True),
    b"/v1/images/generations": ("prompt", True),
    b"/v1/audio/speech": ("input", True),
}
MULTIPART_PATHS: Final = frozenset(
    {b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/images/edits", b"/v1/images/variations"}
)
GENERATION: Final = frozenset(GENERATION_PATHS) | MULTIPART_PATHS
# Parts of a form that are looked at, bytes of a part's headers, bytes of its value that are read.
MAX_FORM_PARTS: Final = 64
MAX_PART_HEAD_BYTES: Final = 1024
MAX_PART_VALUE_BYTES: Final = 4096
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)
_FIELD_NAME: Final = re.compile(
    rb'^content-disposition:[ \t]*form-data;[ \t]*name="?([^";\r\n]{1,64})"?[ \t]*\r?$',
    re.IGNORECASE | re.MULTILINE,
)
_PARAM: Final = re.compile(r"at `\$\.([A-Za-z_]+)")
_decode: Final = msgspec.json.Decoder(Body).decode
_decode_model: Final = msgspec.json.Decoder(Named).decode
_decode_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def parse(path: bytes, content_type: str, body: bytes | bytearray) -> InferenceRequest:
    """Raises GatewayError (invalid_request) that names the field."""
    if path in MULTIPART_PATHS:
        return _parse_form(content_type, body)
    try:
        parsed = _decode(body)
    except msgspec.ValidationError as exc:
        text = str(exc)
        field = _PARAM.search(text)
        missing = re.search(r"missing required field `(\w+)`", text)
        param = field[1] if field else missing[1] if missing else None
        raise GatewayError("invalid_request", f"The request body is not valid: {text}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise GatewayError("invalid_request", f"The request body is not valid JSON: {error}") from None
    if not 0 < len(parsed.model) <= MAX_MODEL_LENGTH:
        text = f"'model' must have 1 to {MAX_MODEL_LENGTH} characters, has {len(parsed.model)}"
        raise GatewayError("invalid_request", text, param="model")
    inference = InferenceRequest(
        parsed.model,
        bool(parsed.stream),
        _prompt(path, parsed),
        max(0, parsed.max_completion_tokens or parsed.max_tokens or parsed.max_output_tokens or 0),
        parsed.cache_salt or "",
    )
    if (
        parsed.owned_by
        is parsed.engine
        is parsed.inference_server
        is parsed.kv_transfer_params
        is parsed.bootstrap_host
        is parsed.bootstrap_port
        is parsed.bootstrap_room
        is parsed.disagg_prefill_dp_rank
        is parsed.disagg_prefill_resp
        is parsed.disaggregated_params
        is parsed.bootstrap_pair_key
        is parsed.vllm_xargs
    ):
        # All of them are EMPTY itself in nearly every body; to ask for their lengths costs 0.4 us.
        return inference
    return _rewritten(inference, parsed, body)


def _rewritten(inference: InferenceRequest, parsed: Body, body: bytes | bytearray) -> InferenceRequest:
    """With an owner, and a body without what only the gateway reads or no client may say."""
    if not (parsed.owned_by is parsed.engine is parsed.inference_server):
        owner = said_in_body(parsed.owned_by, parsed.engine, parsed.inference_server)
        inference = msgspec.structs.replace(inference, owner=owner, body=without_owner(body))
    if any(len(getattr(parsed, name)) for name in (ARGUMENTS, *FORBIDDEN)):
        inference = msgspec.structs.replace(inference, body=without_forbidden(inference.body or body))
    return inference


def with_model(path: bytes, body: bytes | bytearray, model: str) -> bytes | bytearray:
    """A body, valid by `parse`, that names another model, all else byte for byte; forms stay as they are.
    Raises GatewayError if its place is not found: a key in escapes, or many objects inside with models."""
    if path in MULTIPART_PATHS:
        return body
    named = msgspec.json.encode(model)
    held = bytes(_decode_model(body).model)
    # In a string the key's quotes are escaped, so only objects have it; decoding tells the outermost.
    places = re.finditer(rb'"model"[ \t\r\n]*:[ \t\r\n]*(' + re.escape(held) + rb")", body)
    for place in itertools.islice(places, MAX_MODEL_PLACES if held != named else 0):
        changed = body[: place.start(1)] + named + body[place.end(1) :]
        if bytes(_decode_model(changed).model) == named:
            return changed
    if held == named:
        return body
    raise GatewayError("invalid_request", "'model' is not where it can be replaced", param="model")


def asking_usage(body: bytes | bytearray) -> bytes | None:
    """A streaming body, valid by `parse`, that asks for the usage chunk; None if it does already, or says of
    it what no engine takes. But for `stream_options`, what stands in it stays as it is."""
    if b'"stream_options"' not in body:
        start = body.index(b"{") + 1
        return b"".join((body[:start], b'"stream_options":{"include_usage":true},', body[start:]))
    fields = _decode_fields(body)
    try:
        options = _decode_fields(fields.get("stream_options", b"{}"))
    except msgspec.DecodeError:
        if bytes(fields["stream_options"]) != b"null":
            return None
        options = {}
    if bytes(options.get("include_usage", b"")) == b"true":
        return None
    options["include_usage"] = msgspec.Raw(b"true")
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode(options))
    return msgspec.json.encode(fields)


def _prompt(path: bytes, parsed: Body) -> bytes:
    field, required = GENERATION_PATHS[path]
    if field is None:
        return b""
    prompt = bytes(parsed.messages if field == "messages" else getattr(parsed, field))
    if required and len(prompt) <= 4 and prompt in (b"", b"null", b"[]", b'""'):
        raise GatewayError("invalid_request", f"'{field}' is required and must not be empty", param=field)
    if field == "messages" and prompt[:1] != b"[":
        raise GatewayError("invalid_request", "'messages' must be an array", param="messages")
    if parsed.tools is parsed.system:
        return prompt
    # Tools and system text come first in the engines' chat templates, so they come first here.
    return b"".join((parsed.tools, parsed.system, prompt))


def _parse_form(content_type: str, body: bytes | bytearray) -> InferenceRequest:
    if not content_type.lower().startswith("multipart/form-data"):
        raise GatewayError("invalid_request", "this path takes multipart/form-data", param="content-type")
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise GatewayError("invalid_request", "the content type has no boundary", param="content-type")
    fields = _form_fields(b"\r\n--" + (boundary[1] or boundary[2]).encode(), body)
    model = fields.get(b"model", b"").decode("utf-8", "replace")
    if not 0 < len(model) <= MAX_MODEL_LENGTH:
        text = f"form field 'model' is required, with 1 to {MAX_MODEL_LENGTH} characters"
        raise GatewayError("invalid_request", text, param="model")
    stream = fields.get(b"stream", b"").strip().lower() in (b"true", b"1")
    return InferenceRequest(model, stream, b"", 0)


def _form_fields(delimiter: bytes, body: bytes | bytearray) -> dict[bytes, bytes]:
    """The form's fields that are no files; of equal names the last counts, as in JSON."""
    fields: dict[bytes, bytes] = {}
    # The first delimiter's CRLF may be missing, because nothing precedes it.
    start = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    for _ in range(MAX_FORM_PARTS):
        if start == -1:
            break
        head = start + len(delimiter)
        start = body.find(delimiter, head)
        head_end = body.find(b"\r\n\r\n", head, head + MAX_PART_HEAD_BYTES)
        if 0 <= head_end < start and (name := _FIELD_NAME.search(body, head, head_end)):
            fields[bytes(name[1])] = bytes(
                body[head_end + 4 : min(start, head_end + 4 + MAX_PART_VALUE_BYTES)]
            )
    return fields
