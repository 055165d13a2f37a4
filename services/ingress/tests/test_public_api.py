"""The public OpenAPI document leaves nothing out."""

from __future__ import annotations

from penstock.ingress.adapters.http_server import INFO
from penstock.ingress.failures import CODES
from penstock.ingress.openai import GENERATION
from penstock.ingress.public_api import public_document

# Codes that only the admin API has.
ADMIN = {"invalid_admin_token", "forbidden", "version_conflict", "bus_unavailable"}


def test_it_has_every_path_and_method() -> None:
    paths = public_document("1")["paths"]
    told = {(path.encode(), method) for path, methods in paths.items() for method in methods}
    assert told == {(path, "post") for path in GENERATION} | {(path, "get") for path in INFO}


def test_it_has_every_status_that_the_gateway_answers_by_itself() -> None:
    statuses = {str(status) for code, (status, _) in CODES.items() if code not in ADMIN}
    for methods in public_document("1")["paths"].values():
        if "post" in methods:
            assert statuses <= methods["post"]["responses"].keys()
