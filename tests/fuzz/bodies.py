"""JSON bodies, forms, and the bus's messages."""

from __future__ import annotations

import json
import sys
from typing import Any

from penstock.common.codec import DecodeError, decode, decode_record, encode
from penstock.common.messages import LoadReport, Placement, ScheduleBatch, ScheduleReply, ScheduleRequest
from penstock.common.model import Instance
from penstock.common.response_tail import usage_in
from penstock.ingress.block_hash import chain, condense
from penstock.ingress.failures import GatewayError
from penstock.ingress.openai import parse

KINDS = (ScheduleBatch, ScheduleReply, LoadReport, ScheduleRequest, Placement)
CHAT, AUDIO = b"/v1/chat/completions", b"/v1/audio/transcriptions"


def check_body(data: bytes) -> None:
    """A typed error, or the same model and mode that the standard library's reader finds."""
    usage_in(data)
    chain(condense(data), 1, 64)
    try:
        parse(AUDIO, "multipart/form-data; boundary=b", data)
    except GatewayError as exc:
        exc.body()
    try:
        inference = parse(CHAT, "application/json", data)
    except GatewayError as exc:
        json.loads(exc.body())
        return
    assert 0 < len(inference.model) <= 512
    assert inference.max_tokens >= 0
    try:
        # What stands in a prompt is the instance's to judge.
        read: Any = json.JSONDecoder(strict=False).decode(data.decode("utf-8", "replace"))
    except RecursionError:
        return
    assert read["model"] == inference.model
    assert bool(read.get("stream")) == inference.stream


def check_message(data: bytes) -> None:
    """A DecodeError, or a value that survives the way there and back."""
    for kind in KINDS:
        try:
            message = decode(kind, data)
        except DecodeError:
            continue
        assert decode(kind, encode(message)) == message or "nan" in repr(message)
    try:
        decode_record(Instance, data)
    except DecodeError:
        pass


assert sys.getrecursionlimit() <= 10_000, "the standard reader would overflow the stack before it says so"
