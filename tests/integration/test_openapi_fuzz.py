"""Both OpenAPI documents, tried out by schemathesis: whatever is sent, valid or not, no 5xx, and every answer
of the admin API is one that its document tells of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from integration.servers import eventually_sync, http_status
from integration.stack import MODEL, Stack, running_stack
from penstock.ingress.admin.service import api_document
from penstock.ingress.public_api import public_document

pytestmark = pytest.mark.integration

Operation = APIOperation[Any, Any, Any, Any]

EXAMPLES = 10
BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


def operations(document: dict[str, Any]) -> dict[str, Operation]:
    """By method and path."""
    schema = schemathesis.openapi.from_dict(document)
    found = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def cases(known: dict[str, Operation]) -> list[Any]:
    """Each with valid input, and with broken input if it takes any."""
    return [
        pytest.param(name, mode, id=f"{name}-{mode.value}")
        for name, operation in known.items()
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE
        or operation.definition.raw.get("parameters")
        or operation.definition.raw.get("requestBody")
    ]


ADMIN, PUBLIC = operations(api_document()), operations(public_document("1"))


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress()
        for port in (stack.ingresses[0].admin_port, stack.scheduler_ports[0]):
            eventually_sync(lambda: http_status(f"http://127.0.0.1:{port}/readyz") == 200)  # noqa: B023  # awaited in its round
        yield stack


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@pytest.mark.parametrize(("name", "mode"), cases(ADMIN))
def test_the_admin_api_answers_as_its_document_says(
    stack: Stack, client: requests.Session, name: str, mode: GenerationMode
) -> None:
    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]

    @BOUNDED
    @seed(8)
    @given(ADMIN[name].as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        response = case.call(base_url=stack.ingresses[0].admin_url, session=client)
        case.validate_response(response, checks=checks)

    ask()


@pytest.mark.parametrize(("name", "mode"), cases(PUBLIC))
def test_the_public_api_never_answers_with_a_fault_of_its_own(
    stack: Stack, client: requests.Session, name: str, mode: GenerationMode
) -> None:
    @BOUNDED
    @seed(8)
    @given(PUBLIC[name].as_strategy(generation_mode=mode), st.booleans())
    def ask(case: Case[Any], known: bool) -> None:
        if known and isinstance(case.body, dict):
            # Nobody guesses the name of a model.
            case.body["model"] = MODEL
        response = case.call(base_url=stack.url, session=client, timeout=10)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code == 404:
            assert set(response.json()["error"]) == {"message", "type", "code", "param"}

    ask()
