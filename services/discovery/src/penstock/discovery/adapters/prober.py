"""Probes engines over HTTP (aiohttp). Whatever an engine answers, the outcome is a value."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import aiohttp
import msgspec

from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import Endpoint, EngineLoad, Name
from penstock.discovery.engine_metrics import parse_engine_load
from penstock.discovery.reconcile import Verdict

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1024 * 1024
# What a registry record (64 KiB) leaves for its lists.
MAX_NAMES_BYTES = 56 * 1024
MAX_MODELS, MAX_LORA_ADAPTERS = 1024, 4096
# The requests of one probe share a connection, the next probe opens its own: it also proves that the
# engine accepts connections.
KEEP_ALIVE_S = 1.0


class _Model(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    owned_by: Name | None = None
    # Set on LoRA adapters, to their base model (vLLM).
    parent: Name | None = None


class _ModelList(msgspec.Struct):
    data: list[_Model]


class _ProbeFailed(Exception):
    def __init__(self, fault: str, reason: str, status: int = 0) -> None:
        self.fault, self.reason, self.status = fault, reason, status
        super().__init__(reason)


@asynccontextmanager
async def http_prober(timeout_s: float, api_key: str = "") -> AsyncIterator[HttpProber]:
    """A prober with its client session; `api_key` goes to the engines as a bearer token."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "penstock-discovery"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        # The probe's own deadline covers the whole of it, name resolution included.
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
    ) as session:
        yield HttpProber(session, timeout_s)


class HttpProber:
    """Fulfils `ports.Prober`."""

    def __init__(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self._session, self._timeout_s = session, timeout_s

    async def check(self, endpoint: Endpoint) -> Verdict:
        """GET /health (absent in some engines: 404 is passed over), then GET /v1/models."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._health(endpoint)
                return _verdict(await self._get(endpoint, "/v1/models"))
        except Exception as exc:  # noqa: BLE001  # an engine's answer costs its probe, never the service
            fault, reason = self._explain(endpoint, exc)
            return Verdict(fault, reason)

    async def read_load(self, endpoint: Endpoint) -> EngineLoad | None:
        """GET /metrics."""
        try:
            async with asyncio.timeout(self._timeout_s):
                load = parse_engine_load(await self._get(endpoint, "/metrics"))
        except Exception as exc:  # noqa: BLE001  # as above
            log.debug("load of %s: %s", endpoint, self._explain(endpoint, exc)[1])
            return None
        return load if load != EngineLoad() else None

    async def _health(self, endpoint: Endpoint) -> None:
        try:
            await self._get(endpoint, "/health")
        except _ProbeFailed as exc:
            if exc.status != 404:
                raise

    async def _get(self, endpoint: Endpoint, path: str) -> bytes:
        async with self._session.get(endpoint.url + path, allow_redirects=False) as response:
            status = response.status
            if 300 <= status < 400:
                raise _ProbeFailed(
                    "redirect", f"{path} answers with a redirect, which is not followed", status
                )
            if not 200 <= status < 300:
                hint = " (does it need --engine-api-key?)" if status in (401, 403) else ""
                raise _ProbeFailed("status", f"{path} answers {status}{hint}", status)
            return await _read(response, path)

    def _explain(self, endpoint: Endpoint, exc: Exception) -> tuple[str, str]:
        """(fault, reason); the reason holds nothing that differs from probe to probe."""
        match exc:
            case _ProbeFailed():
                return exc.fault, exc.reason
            case TimeoutError():
                return "timeout", f"no answer within {self._timeout_s:g} s"
            case aiohttp.ClientConnectorDNSError():
                return "name", "its host name cannot be resolved"
            case aiohttp.ClientConnectorError(os_error=OSError(errno=errno.ECONNREFUSED)):
                return "refused", "connection refused"
            case aiohttp.ClientConnectorError():
                return "unreachable", "no connection can be made"
            case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | ConnectionError():
                return "disconnected", "it closed the connection without an answer"
            case aiohttp.ClientError() | ValueError() | OSError():
                return "malformed", "its answer is not HTTP, or is cut short"
        log.error("probe of %s failed unexpectedly", endpoint, exc_info=exc)
        return "unexpected", f"the probe failed: {type(exc).__name__}"


async def _read(response: aiohttp.ClientResponse, path: str) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            response.close()
            raise _ProbeFailed("too_large", f"{path} answers with more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _verdict(body: bytes) -> Verdict:
    """A list of models as a verdict, sorted so that an engine's order changes no record."""
    try:
        listed = decode_record(_ModelList, body).data
    except DecodeError:
        raise _ProbeFailed("malformed", "/v1/models is not a list of models") from None
    models = tuple(sorted({model.id for model in listed if not model.parent}))
    lora_adapters = tuple(sorted({model.id for model in listed if model.parent} - {*models}))
    if not models:
        raise _ProbeFailed("no_models", "/v1/models lists no model")
    too_many = len(models) > MAX_MODELS or len(lora_adapters) > MAX_LORA_ADAPTERS
    if too_many or len(encode_record([models, lora_adapters])) > MAX_NAMES_BYTES:
        bound = f"{MAX_MODELS} models, {MAX_LORA_ADAPTERS} LoRA adapters, {MAX_NAMES_BYTES} bytes"
        raise _ProbeFailed("too_large", f"/v1/models lists too many names, over {bound}")
    owner = next((model.owned_by for model in listed if not model.parent and model.owned_by), "")
    return Verdict(models=models, lora_adapters=lora_adapters, owner=owner)
