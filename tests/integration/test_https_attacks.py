"""The cases of broken HTTP from clients again, under TLS: the same answers, and the same ends."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import trustme

from integration.http_cases import CASES, Case
from integration.test_http_attacks import Range, play, running_range

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attacked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Range]:
    folder: Path = tmp_path_factory.mktemp("tls")
    authority, trust = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trust)
    pair = authority.issue_cert("127.0.0.1")
    pair.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    pair.private_key_pem.write_to_path(folder / "tls.key")
    flags = ("--tls-cert", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key"))
    async with running_range(*flags, tls=trust) as attacked:
        yield attacked


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_what_a_client_sends_has_the_same_answer_under_tls(attacked: Range, case: Case) -> None:
    before = attacked.engine.chats
    answers = await play(attacked, case)
    relayed = sum("target-pod" in answer.headers for answer in answers)
    assert attacked.engine.chats - before == relayed
    await attacked.alive()
