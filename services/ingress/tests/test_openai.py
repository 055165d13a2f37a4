"""Bodies become InferenceRequests, or errors that name the field."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress.failures import GatewayError
from penstock.ingress.openai import GENERATION_PATHS, MULTIPART_PATHS, parse, with_model
from penstock.ingress.request_body import InferenceRequest

CHAT = b"/v1/chat/completions"
TRANSCRIPTION = b"/v1/audio/transcriptions"
JSON = "application/json"


def refused(path: bytes, body: bytes, content_type: str = JSON) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        parse(path, content_type, body)
    assert caught.value.code == "invalid_request"
    return caught.value


@pytest.mark.parametrize(
    ("path", "body", "prompt"),
    [
        (
            CHAT,
            '{"model":"m","messages":[{"role":"user","content":"hi"}]}',
            '[{"role":"user","content":"hi"}]',
        ),
        (b"/v1/completions", '{"model":"m","prompt":"once"}', '"once"'),
        (b"/v1/completions", '{"model":"m","prompt":[1,2]}', "[1,2]"),
        (b"/v1/embeddings", '{"model":"m","input":["a", "b"]}', '["a", "b"]'),
        (b"/v1/responses", '{"model":"m","input":"q"}', '"q"'),
        (b"/v1/messages", '{"model":"m","system":"s","messages":[1]}', '"s"[1]'),
        (b"/v1/rerank", '{"model":"m","query":"q","documents":["d"]}', '["d"]'),
        (b"/v1/images/generations", '{"model":"m","prompt":"a cat"}', '"a cat"'),
        (b"/v1/audio/speech", '{"model":"m","input":"say"}', '"say"'),
        (CHAT, '{"messages":[1],"tools":[{"t":1}],"model":"m"}', '[{"t":1}][1]'),
        (CHAT, '{"messages":[1],"system":"s","tools":[2],"model":"m"}', '[2]"s"[1]'),
    ],
)
def test_the_prompt_of_each_path_stays_as_the_bytes_it_came_in(path: bytes, body: str, prompt: str) -> None:
    request = parse(path, JSON, body.encode())
    assert (request.model, request.prompt) == ("m", prompt.encode())


def test_every_json_path_has_a_case_of_its_own_prompt_field() -> None:
    for path, (field, required) in GENERATION_PATHS.items():
        assert field is not None
        assert required
        body = json.dumps({"model": "m", field: ["x" * 400]}).encode()
        assert parse(path, JSON, body).prompt_tokens == 101


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ("", 0),
        ('"max_tokens":5,', 5),
        ('"max_tokens":5,"max_completion_tokens":7,', 7),
        ('"max_output_tokens":9,', 9),
        ('"max_tokens":null,"max_output_tokens":9,', 9),
        ('"max_tokens":-5,', 0),
    ],
)
def test_the_bound_of_the_answer_is_read_from_any_of_its_names(fields: str, max_tokens: int) -> None:
    assert parse(CHAT, JSON, f'{{{fields}"model":"m","messages":[1]}}'.encode()).max_tokens == max_tokens


@pytest.mark.parametrize(("field", "stream"), [("true", True), ("false", False), ("null", False)])
def test_stream_is_read(field: str, stream: bool) -> None:
    assert parse(CHAT, JSON, f'{{"stream":{field},"model":"m","messages":[1]}}'.encode()).stream is stream


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, '{"messages":[1]}', "model"),
        (CHAT, '{"model":null,"messages":[1]}', "model"),
        (CHAT, '{"model":7,"messages":[1]}', "model"),
        (CHAT, '{"model":"","messages":[1]}', "model"),
        (CHAT, json.dumps({"model": "m" * 513, "messages": [1]}), "model"),
        (CHAT, '{"model":"m"}', "messages"),
        (CHAT, '{"model":"m","messages":null}', "messages"),
        (CHAT, '{"model":"m","messages":[]}', "messages"),
        (CHAT, '{"model":"m","messages":"hi"}', "messages"),
        (CHAT, '{"model":"m","messages":{}}', "messages"),
        (CHAT, '{"model":"m","prompt":"hi"}', "messages"),
        (b"/v1/messages", '{"model":"m","messages":"hi"}', "messages"),
        (b"/v1/completions", '{"model":"m"}', "prompt"),
        (b"/v1/completions", '{"model":"m","prompt":""}', "prompt"),
        (b"/v1/embeddings", '{"model":"m","input":[]}', "input"),
        (b"/v1/rerank", '{"model":"m","query":"q"}', "documents"),
        (b"/v1/responses", '{"model":"m"}', "input"),
        (CHAT, '{"model":"m","messages":[1],"stream":"yes"}', "stream"),
        (CHAT, '{"model":"m","messages":[1],"stream":1}', "stream"),
        (CHAT, '{"model":"m","messages":[1],"max_tokens":"5"}', "max_tokens"),
        (CHAT, '{"model":"m","messages":[1],"max_tokens":1e999}', "max_tokens"),
        (CHAT, '{"model":"m","messages":[1],"max_tokens":' + "9" * 5000 + "}", "max_tokens"),
        (CHAT, '{"model":"m","messages":[1],"cache_salt":1}', "cache_salt"),
    ],
)
def test_a_missing_empty_or_wrong_field_is_named(path: bytes, body: str, param: str) -> None:
    error = refused(path, body.encode())
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="array"),
        pytest.param(b'"model"', id="string"),
        pytest.param(b'{"model":"m","messages":[1]', id="cut off"),
        pytest.param(b'{"model":"m","messages":[1]} {}', id="two values"),
        pytest.param(b"{'model':'m'}", id="single quotes"),
        pytest.param(b'{"model":"m","messages":[nope]}', id="no JSON in the prompt"),
        pytest.param(b'{"model":"m","messages":["\\q"]}', id="unknown escape in the prompt"),
        pytest.param(b'{"model":"m","messages":["a\nb"]}', id="line break in a string"),
        pytest.param(b'\xef\xbb\xbf{"model":"m","messages":[1]}', id="byte order mark"),
        pytest.param('{"model":"m","messages":[1]}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"model":"\xff","messages":[1]}', id="invalid UTF-8"),
        pytest.param(b'{"model":"\\ud800","messages":[1]}', id="half a surrogate pair"),
        pytest.param(b'{"model":"m","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}", id="deep array"),
        pytest.param(b'{"model":"m","messages":[1],"x":' + b'{"a":' * 200_000, id="deep unknown field"),
        pytest.param(b'{"model":' * 200_000, id="deep model"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_an_error_of_the_client(body: bytes) -> None:
    refused(CHAT, body)


def test_of_equal_keys_the_last_counts_as_it_does_in_the_engines() -> None:
    request = parse(CHAT, JSON, b'{"model":"a","messages":[1],"model":"b","messages":[2]}')
    assert (request.model, request.prompt) == ("b", b"[2]")


def outcome(path: bytes, content_type: str, body: bytes) -> InferenceRequest | GatewayError:
    try:
        return parse(path, content_type, body)
    except GatewayError as exc:
        return exc


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: json.dumps({"model": text}).encode()))
def test_any_bytes_are_a_request_or_an_error_of_the_client(body: bytes) -> None:
    for path, content_type in ((CHAT, JSON), (TRANSCRIPTION, "multipart/form-data; boundary=x")):
        answer = outcome(path, content_type, body)
        assert answer.model if isinstance(answer, InferenceRequest) else answer.status == 400


# -- forms ---------------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=xYz"


def form(*parts: tuple[str, bytes], end: bytes = b"--xYz--\r\n") -> bytes:
    return (
        b"".join(b"--xYz\r\n" + head.encode() + b"\r\n\r\n" + value + b"\r\n" for head, value in parts) + end
    )


def field(name: str, value: bytes) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', value


FILE = (
    'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav',
    b"\0" * 999,
)


@pytest.mark.parametrize("path", sorted(MULTIPART_PATHS))
def test_model_and_stream_are_found_beside_a_file(path: bytes) -> None:
    for parts in (
        (FILE, field("model", b"whisper"), field("stream", b"true")),
        (field("stream", b" 1 "), field("model", b"whisper"), FILE),
    ):
        assert parse(path, FORM, form(*parts)) == InferenceRequest("whisper", True, b"", 0)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        pytest.param(
            'Multipart/Form-Data; charset=x; Boundary="xYz"', form(field("model", b"m")), id="quoted"
        ),
        pytest.param(FORM, b"preamble\r\n" + form(field("model", b"m")), id="preamble"),
        pytest.param(FORM, form(field("model", b"m"), end=b"--xYz"), id="end without line break"),
        pytest.param(
            FORM,
            form(('content-type: text/plain\r\nCONTENT-DISPOSITION:form-data;name="model"', b"m")),
            id="another header first",
        ),
        pytest.param(FORM, form(("content-disposition: form-data; name=model", b"m")), id="bare name"),
        pytest.param(FORM, form(field("model", b"old"), field("model", b"m")), id="twice, the last counts"),
        pytest.param(FORM, form(field("model", b"m"), field("stream", b"false")), id="stream is false"),
    ],
)
def test_forms_are_read_as_clients_write_them(content_type: str, body: bytes) -> None:
    assert parse(TRANSCRIPTION, content_type, body) == InferenceRequest("m", False, b"", 0)


DISGUISED = b'x\r\nContent-Disposition: form-data; name="model"\r\n\r\nevil\r\n'


@pytest.mark.parametrize(
    ("content_type", "body", "param"),
    [
        pytest.param(JSON, form(field("model", b"m")), "content-type", id="JSON type"),
        pytest.param("", form(field("model", b"m")), "content-type", id="no type"),
        pytest.param("multipart/form-data", form(field("model", b"m")), "content-type", id="no boundary"),
        pytest.param(
            "multipart/form-data; boundary=", form(field("model", b"m")), "content-type", id="empty one"
        ),
        pytest.param(
            "multipart/form-data; boundary=other", form(field("model", b"m")), "model", id="another"
        ),
        pytest.param(FORM, b"", "model", id="nothing"),
        pytest.param(FORM, form(FILE), "model", id="no model"),
        pytest.param(FORM, form(field("model", b"")), "model", id="empty model"),
        pytest.param(FORM, form(field("model", b"m" * 513)), "model", id="long model"),
        pytest.param(FORM, form(field("model", b"m" * 100_000)), "model", id="very long model"),
        pytest.param(FORM, form(field("model", b"m"), end=b"")[:-2], "model", id="cut off"),
        pytest.param(FORM, form(field("file", DISGUISED)), "model", id="model inside another field"),
        pytest.param(
            FORM,
            form(('content-disposition: form-data; name="model"; filename="m"', b"m")),
            "model",
            id="model as a file",
        ),
        pytest.param(FORM, form(*[field("x", b"")] * 64, field("model", b"m")), "model", id="too many parts"),
        pytest.param(
            FORM,
            form(("x: " + "y" * 1100 + "\r\n" + field("model", b"")[0], b"m")),
            "model",
            id="long part head",
        ),
    ],
)
def test_a_form_without_a_usable_model_is_refused(content_type: str, body: bytes, param: str) -> None:
    assert refused(TRANSCRIPTION, body, content_type).param == param


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'Content-Disposition: form-data; name="model"\r\n' * 90_000, id="headers without end"),
        pytest.param(b"--xYz\r\n" * 600_000, id="delimiters"),
        pytest.param((b"--xYz\r\n" + b"a" * 1000 + b"\r\n") * 4000, id="parts without a head's end"),
        pytest.param(b"\r\n--xY" * 700_000, id="almost delimiters"),
    ],
)
@pytest.mark.timeout(20)
def test_a_hostile_form_of_4_mib_is_refused_at_once(body: bytes) -> None:
    # Each takes a few ms; a pattern over the whole body takes minutes for the first.
    refused(TRANSCRIPTION, body, FORM)


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (b'{"model":"m","prompt":"hi"}', b'{"model":"new","prompt":"hi"}'),
        (b'{ "n" : 1.50, "model"\n:\t"m" }', b'{ "n" : 1.50, "model"\n:\t"new" }'),
        (b'{"x":{"model":"m"},"model":"m"}', b'{"x":{"model":"m"},"model":"new"}'),
        (b'{"model":"a","model":"m"}', b'{"model":"a","model":"new"}'),
        (b'{"model":"m","model":"m"}', b'{"model":"m","model":"new"}'),
        (b'{"p":"\\"model\\":\\"m\\"","model":"m"}', b'{"p":"\\"model\\":\\"m\\"","model":"new"}'),
        (b'{"model":"\\u006d"}', b'{"model":"new"}'),
        (b'{"model":"new"}', b'{"model":"new"}'),
    ],
)
def test_a_body_that_names_another_model_is_else_the_same(body: bytes, changed: bytes) -> None:
    assert with_model(b"/v1/completions", body, "new") == changed
    assert with_model(b"/v1/completions", bytearray(body), "new") == changed
    assert with_model(b"/v1/images/edits", body, "new") == body


@pytest.mark.parametrize(
    "body", [b'{"mod\\u0065l":"m"}', b'{"x":[' + b'{"model":"m"},' * 9 + b'1],"model":"m"}']
)
def test_a_model_that_cannot_be_found_in_its_body_is_refused(body: bytes) -> None:
    with pytest.raises(GatewayError, match="not where it can be replaced"):
        with_model(b"/v1/completions", body, "new")
