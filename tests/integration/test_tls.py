"""HTTPS of real processes: every worker shows a fresh certificate, and none falls over a broken one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
import trustme

from integration.drills import Event, following, workers
from integration.servers import Process, eventually
from integration.stack import MODEL, Ingress, Stack, messages, metric, running_stack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def put_pair(authority: trustme.CA, folder: Path) -> None:
    """A fresh certificate and its key, in the place of those there are."""
    pair = authority.issue_cert("127.0.0.1")
    for name, data in (
        ("tls.crt", b"".join(part.bytes() for part in pair.cert_chain_pems)),
        ("tls.key", pair.private_key_pem.bytes()),
    ):
        (folder / f"new-{name}").write_bytes(data)
        (folder / f"new-{name}").replace(folder / name)


def flags(folder: Path) -> tuple[str, ...]:
    return "--tls-cert", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")


@pytest.fixture(scope="module")
def stack(authority: trustme.CA, folder: Path) -> Iterator[Stack]:
    put_pair(authority, folder)
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_ingress("--workers", "2", *flags(folder))
        yield stack


async def serials(ingress: Ingress, trust: ssl.SSLContext) -> set[str]:
    """Of the certificates that a dozen connections are shown, which the kernel spreads over the workers."""
    found = set()
    for _ in range(12):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", ingress.port, ssl=trust)
        except OSError:
            return set()
        found.add(writer.get_extra_info("peercert")["serialNumber"])
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return found


async def test_certificates_change_while_streams_run_and_broken_ones_change_nothing(
    stack: Stack, authority: trustme.CA, folder: Path
) -> None:
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    (ingress,) = stack.ingresses
    await stack.ready()
    url = f"https://127.0.0.1:{ingress.port}/v1/chat/completions"
    async with (
        following(stack) as log,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust, force_close=True)) as session,
    ):

        async def stale() -> float:
            return await metric(session, ingress.admin_port, "penstock_ingress_tls_stale")

        async def served() -> bool:
            body = {"model": MODEL, "messages": messages("x"), "max_tokens": 1}
            try:
                async with session.post(url, json=body) as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        await eventually(served)
        first = await serials(ingress, trust)
        assert len(first) == 1
        body = {"model": MODEL, "messages": messages("long"), "max_tokens": 2000, "stream": True}
        async with session.post(url, json=body) as stream:
            assert stream.status == 200
            await stream.content.readline()
            put_pair(authority, folder)

            async def fresh() -> bool:
                shown = await serials(ingress, trust)
                return len(shown) == 1 and shown != first

            await eventually(fresh)
            second = await serials(ingress, trust)
            (folder / "tls.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
            os.kill(ingress.process.pid, signal.SIGHUP)
            await eventually(stale)
            # A worker that starts now has no files to read: it gets what the others have.
            workers(ingress)[0].kill()
            lost = "penstock_ingress_worker_restarts_total"
            await eventually(lambda: metric(session, ingress.admin_port, lost))
            await stack.ready()
            assert await serials(ingress, trust) == second
        await eventually(lambda: ["the TLS certificate", True] in told(log))
        assert any("the TLS certificate cannot be used" in line for line in ingress.process.lines)
        put_pair(authority, folder)
        await eventually(lambda: _not(stale))
        await eventually(lambda: ["the TLS certificate", False] in told(log))
        assert await serials(ingress, trust) not in (first, second)
        await eventually(served)


def told(log: list[Event]) -> list[list[object]]:
    """What was degraded, and whether it began."""
    return [[data["what"], data["active"]] for kind, data in log if kind == "degraded"]


async def _not(value: object) -> bool:
    return not await value()  # type: ignore[operator]


def test_a_pair_that_does_not_fit_stops_the_start_with_a_message(
    authority: trustme.CA, tmp_path: Path
) -> None:
    put_pair(authority, tmp_path)
    (tmp_path / "tls.key").write_bytes(trustme.CA().issue_cert("a").private_key_pem.bytes())
    with Process.module("penstock.ingress", "--port", "0", *flags(tmp_path)) as process:
        assert process.wait(30.0) == 2
        text = "\n".join(process.lines)
        assert "--tls-cert and --tls-key cannot be used: key values mismatch" in text
        assert "Traceback" not in text
        assert "PRIVATE KEY" not in text
