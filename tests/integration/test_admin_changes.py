"""Every kind of change through the admin API: seen by all, told in the log with who made it, and durable; and
who is let in, by token, listener and address."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from integration.drills import following
from integration.servers import eventually
from integration.stack import MODEL, Ingress, Stack, running_stack

pytestmark = pytest.mark.integration

TOKEN = "token-of-the-admin"
OPS = {"x-admin-user": "ops@example.org"}
HASH = "0" * 64
# Kind in the log -> path, what is written first, and then.
DOCUMENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "user": ("users/alice", {"rpm": 6}, {"rpm": 7}),
    "profile": (
        "profiles/other",
        {"profiles": {"default": {"routing_strategy": "random"}}},
        {"profiles": {"default": {"routing_strategy": "least-request"}}},
    ),
    "key": ("keys/laptop", {"owner": "bob", "hashes": [HASH]}, {"owner": "alice", "hashes": [HASH]}),
    "route": (
        "routes",
        {"policy": "prefix", "routes": [{"base_url": "local", "prefix": "*"}]},
        {"policy": "weight", "routes": [{"base_url": "local", "weight": 1}]},
    ),
    "mirror": ("mirror", {"Enable": False}, {"Enable": False, "Ratio": 5}),
}
MAPPING = {"model": MODEL, "owned_by": "team", "service_name": "to-come"}


def elsewhere() -> str:
    """An address of this machine that is not loopback; empty if it has none."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family is socket.AF_INET and not ipaddress.ip_address(one.address).is_loopback:
                return str(one.address)
    return ""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Two ingresses: one as it comes, one with a token, wide, and on the public port too."""
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_ingress()
        wide = ("--host", "0.0.0.0", "--admin-host", "0.0.0.0", "--admin-on-public-port")
        stack.start_ingress(*wide, "--admin-token", TOKEN)
        yield stack


@pytest.fixture
async def session(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        yield session


async def ask(
    session: aiohttp.ClientSession, method: str, url: str, body: Any = None, **headers: str
) -> tuple[int, Any]:
    async with session.request(method, url, json=body, headers=headers) as response:
        return response.status, json.loads(await response.read())


async def seen(session: aiohttp.ClientSession, ingress: Ingress, engine: str) -> dict[str, Any]:
    """What an ingress knows of each kind: (version, value), who drains, what is mapped."""
    token = {"authorization": f"Bearer {TOKEN}"}
    found: dict[str, Any] = {}
    for kind, (path, _, _) in DOCUMENTS.items():
        status, shown = await ask(session, "GET", f"{ingress.admin_url}/admin/api/{path}", **token)
        found[kind] = (shown["version"], shown["value"], shown["by"]) if status == 200 else None
    _, instance = await ask(session, "GET", f"{ingress.admin_url}/admin/api/instances/{engine}", **token)
    found["drain"] = instance.get("drain") and instance["drain"]["reason"]
    _, routing = await ask(session, "GET", f"{ingress.admin_url}/admin/api/routing", **token)
    found["mapping"] = [one["service_name"] for one in routing["routes"] if one["source"] == "manual"]
    return found


async def test_every_kind_of_change_reaches_all_is_told_and_outlives_everything(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    engine, api = stack.engines[0], f"{stack.ingresses[0].admin_url}/admin/api"
    async with following(stack, ("config",)) as log:
        for path, *values in DOCUMENTS.values():
            for value in values:
                status, shown = await ask(session, "PUT", f"{api}/{path}", value, **OPS)
                assert status in (200, 201), shown
        assert (await ask(session, "POST", f"{api}/routing?force=true", MAPPING, **OPS))[0] == 201
        drain = {"reason": "new driver"}
        assert (await ask(session, "POST", f"{api}/instances/{engine}/drain", drain, **OPS))[0] == 200

        def told(change: str) -> set[str]:
            return {
                data["kind"]
                for _, data in log
                if data["change"] == change and data["by"].startswith("ops@example.org at 127.0.0.1")
            }

        kinds = {*DOCUMENTS, "drain", "mapping"}
        await eventually(lambda: told("created") == kinds and told("updated") == set(DOCUMENTS))
        versions = {data["kind"]: data["version"] for _, data in log}
        assert versions == {**dict.fromkeys(DOCUMENTS, 2), "drain": 1, "mapping": 1}
        assert HASH not in json.dumps(log)
    known = await seen(session, stack.ingresses[0], engine)
    assert {kind: known[kind][0] for kind in DOCUMENTS} == dict.fromkeys(DOCUMENTS, 2)
    assert (known["drain"], known["mapping"]) == ("new driver", ["to-come"])

    async def everywhere() -> bool:
        return all([await seen(session, one, engine) == known for one in stack.ingresses])

    await eventually(everywhere)
    # All who know of it end, and so does the bus; it keeps its store.
    assert stack.discovery is not None
    for process in (*(one.process for one in stack.ingresses), stack.discovery):
        process.kill()
    stack.ingresses.clear()
    await asyncio.to_thread(stack.nats.restart, keep_store=True)
    stack.start_discovery()
    stack.start_ingress()
    wide = ("--host", "0.0.0.0", "--admin-host", "0.0.0.0", "--admin-on-public-port")
    stack.start_ingress(*wide, "--admin-token", TOKEN)
    await stack.ready()
    await eventually(everywhere)


CALLS = [("GET", "api/instances"), ("GET", "api/routing"), ("GET", "api/users"), ("POST", "discover")]


async def test_who_is_let_in_by_token_listener_and_address(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    closed, wide = stack.ingresses
    hosts = ["127.0.0.1", *([elsewhere()] if elsewhere() else [])]
    bearer = f"Bearer {TOKEN}"
    for method, path in CALLS:
        for host in hosts:
            for port in (wide.admin_port, wide.port):
                url = f"http://{host}:{port}/admin/{path}"
                for given in ({}, {"authorization": "Bearer no"}, {"authorization": TOKEN}):
                    status, answer = await ask(session, method, url, **given)
                    assert (status, answer["error"]["code"]) == (401, "invalid_admin_token")
                assert (await ask(session, method, url, authorization=bearer))[0] == 200
        local = f"http://127.0.0.1:{closed.admin_port}/admin/{path}"
        assert (await ask(session, method, local))[0] == 200
        # Its public port knows no admin API, with whatever token.
        public = f"http://127.0.0.1:{closed.port}/admin/{path}"
        assert (await ask(session, method, public, authorization=bearer))[0] == 404
    for host in hosts[1:]:
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(session, "GET", f"http://{host}:{closed.admin_port}/admin/api/routing")
