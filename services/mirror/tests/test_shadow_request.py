"""A copy as it goes to the shadow, and copies that do not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.common.messages import MirrorCopy
from penstock.common.mirroring import MirrorConfig
from penstock.mirror.shadow_request import UnusableCopy, shadow_request


def config(**fields: Any) -> MirrorConfig:
    return MirrorConfig.model_validate({"Enable": True, "Target": "http://shadow:8", "Ratio": 1} | fields)


def copy(**fields: Any) -> MirrorCopy:
    values = {
        "id": "c-1",
        "request_id": "r-1",
        "model": "m",
        "method": b"POST",
        "target": b"/v1/completions?a=%2F",
        "headers": b"content-type: application/json\r\nX-Own:  a b\t\r\n",
        "body": b'{"model": "m"}',
    }
    return MirrorCopy(**(values | fields))


def test_method_path_query_headers_and_body_are_the_requests() -> None:
    request = shadow_request(copy(), config(Target="http://shadow:8/base/"))
    assert (request.method, request.url) == ("POST", "http://shadow:8/base/v1/completions?a=%2F")
    assert request.body == b'{"model": "m"}'
    assert request.headers == (
        ("content-type", "application/json"),
        ("X-Own", "a b"),
        ("x-request-id", "r-1"),
        ("x-penstock-mirror", "c-1"),
    )


@pytest.mark.parametrize(
    ("raw", "text"), [("caf\xe9".encode(), "caf\xe9"), (b"caf\xe9", "caf\xe9"), (b"", "")]
)
def test_text_in_headers_is_utf_8_where_it_can_be(raw: bytes, text: str) -> None:
    assert shadow_request(copy(headers=b"a: %b\r\n" % raw), config()).headers[0] == ("a", text)


@pytest.mark.parametrize(
    ("authorization", "sent"),
    [("", ["Bearer client"]), ("Bearer shadow", ["Bearer shadow"]), ("sk-plain", ["sk-plain"])],
)
def test_authorization_is_replaced_as_it_stands_when_it_is_set(authorization: str, sent: list[str]) -> None:
    given = copy(headers=b"Authorization: Bearer client\r\n")
    headers = shadow_request(given, config(Authorization=authorization)).headers
    assert [value for name, value in headers if name.lower() == "authorization"] == sent


def test_the_model_is_rewritten_and_nothing_else() -> None:
    body = b'{"model": "m", "big": 12345678901234567890123, "text": "\\u00e9", "nested": {"model": "m"}}'
    sent = shadow_request(copy(body=body), config(RewriteModel="other")).body
    assert sent == b'{"model":"other","big":12345678901234567890123,"text":"\\u00e9","nested":{"model": "m"}}'
    assert json.loads(sent) == json.loads(body) | {"model": "other"}


@pytest.mark.parametrize("body", [b"", b"[]", b"--form", b'{"a":' * 10_000, b"\xff"])
def test_a_body_without_a_model_is_not_sent_under_another_one(body: bytes) -> None:
    with pytest.raises(UnusableCopy, match="no model to rewrite"):
        shadow_request(copy(body=body), config(RewriteModel="other"))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": b"GET / HTTP/1.1\r\nx: y"},
        {"method": b""},
        {"method": b"post"},
        {"target": b""},
        {"target": b"http://elsewhere/"},
        {"target": b"@elsewhere/"},
        {"target": b"/a b"},
        {"target": b"/a\r\nx: y"},
        {"target": "/\xe9".encode()},
        {"headers": b"no colon\r\n"},
        {"headers": b"a b: c\r\n"},
        {"headers": b"a: b\nc: d\r\n"},
        {"headers": b"a: \x00\r\n"},
        {"request_id": "a\r\nb: c"},
        {"id": "\u20ac"},
    ],
)
def test_a_copy_that_is_no_request_goes_nowhere(fields: dict[str, Any]) -> None:
    with pytest.raises(UnusableCopy, match="invalid"):
        shadow_request(copy(**fields), config())


def test_headers_of_one_hop_are_not_taken_from_a_copy() -> None:
    hop = b"Host: elsewhere\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\nConnection: x\r\n"
    hop += b"X-Request-Id: z\r\n"
    headers = shadow_request(copy(headers=hop), config()).headers
    assert headers == (("x-request-id", "r-1"), ("x-penstock-mirror", "c-1"))
