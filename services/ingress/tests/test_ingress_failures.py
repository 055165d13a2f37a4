"""Every way to fail has a status and a phrase, and every rejection of a scheduler is one of them."""

import json

import pytest

from penstock.common.messages import Reason
from penstock.ingress.failures import CODES, PHRASES, REJECTIONS, GatewayError


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_status_with_a_phrase_and_a_body_in_openai_form(code: str) -> None:
    error = GatewayError(code, 'it "failed"', param="model")
    assert 400 <= error.status <= 599
    assert error.status != 500
    assert PHRASES[error.status]
    body = json.loads(error.body())
    assert body == {
        "error": {"message": 'it "failed"', "type": CODES[code][1], "code": code, "param": "model"}
    }


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("model_not_found", 404),
        ("not_found", 404),
        ("method_not_allowed", 405),
        ("headers_too_large", 431),
        ("request_timeout", 408),
        ("request_too_large", 413),
        ("overloaded", 503),
        ("no_available_instance", 503),
        ("internal_error", 503),
        ("upstream_unreachable", 502),
        ("upstream_timeout", 504),
    ],
)
def test_the_codes_of_the_public_api_have_its_statuses(code: str, status: int) -> None:
    assert GatewayError(code, "").status == status


def test_every_reason_of_a_rejection_is_mapped_to_a_code() -> None:
    assert set(REJECTIONS) == set(Reason)
    assert set(REJECTIONS.values()) <= set(CODES)


def test_an_unknown_code_does_not_become_an_answer() -> None:
    with pytest.raises(KeyError):
        GatewayError("no_such_code", "").body()
