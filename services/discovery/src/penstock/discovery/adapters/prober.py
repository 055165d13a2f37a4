"""Probes engines over HTTP. Whatever an engine answers, the outcome is a value."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec

from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import Endpoint, EngineLoad, Name
from penstock.discovery.adapters.engine_link import Dialer, HostRefused, Link
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.engine_metrics import (
    absurd_figures,
    engine_of_metrics,
    engine_of_owner,
    parse_engine_load,
)
from penstock.discovery.http_answer import MAX_ANSWER_BYTES, BadAnswer
from penstock.discovery.ports import Reading
from penstock.discovery.reconcile import Verdict

log = logging.getLogger(__name__)

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
    def __init__(self, fault: str, reason: str) -> None:
        self.fault, self.reason = fault, reason
        super().__init__(reason)


@asynccontextmanager
async def http_prober(
    timeout_s: float,
    api_key: str = "",
    tls: ssl.SSLContext | None = None,
    *,
    allowed: AllowedHosts | None = None,
) -> AsyncIterator[HttpProber]:
    """A prober; `api_key` goes to the engines as a bearer token, https ones are verified with `tls` (the
    system's certificates if not given), none is asked at an address that is not `allowed`."""
    prober = HttpProber(timeout_s, api_key, Dialer(allowed or AllowedHosts(), tls))
    try:
        yield prober
    finally:
        prober.close()


class HttpProber:
    """Fulfils `ports.Prober`."""

    def __init__(self, timeout_s: float, api_key: str, dialer: Dialer) -> None:
        self._timeout_s, self._dialer = timeout_s, dialer
        fields = ["Accept: */*", "Accept-Encoding: identity", "User-Agent: penstock-discovery"]
        if api_key:
            fields.append(f"Authorization: Bearer {api_key}")
        self._fields = "\r\n".join(fields)
        self._idle: dict[Endpoint, tuple[Link, asyncio.TimerHandle]] = {}

    def close(self) -> None:
        """Close what is open."""
        for endpoint in list(self._idle):
            self._drop(endpoint)

    async def check(self, endpoint: Endpoint) -> Verdict:
        """GET /health (absent in some engines: 404 is passed over), then GET /v1/models (404: an engine
        that does not say which models it serves)."""
        self._drop(endpoint)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._get(endpoint, "/health", unless=404)
                listed = await self._get(endpoint, "/v1/models", unless=404)
                return _verdict(listed) if listed is not None else Verdict()
        except Exception as exc:  # noqa: BLE001  # an engine's answer costs its probe, never the service
            self._drop(endpoint)
            fault, reason = self._explain(endpoint, exc)
            return Verdict(fault, reason)

    async def read_load(self, endpoint: Endpoint) -> Reading:
        """GET /metrics."""
        text = await self.read(endpoint, "/metrics") or b""
        load = parse_engine_load(text)
        absurd = tuple(absurd_figures(text))
        return Reading(load if load != EngineLoad() else None, engine_of_metrics(text), absurd)

    async def read(self, endpoint: Endpoint, path: str) -> bytes | None:
        """The body of a GET; None if it fails, for whatever reason."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._get(endpoint, path)
        except Exception as exc:  # noqa: BLE001  # as above
            log.debug("%s of %s: %s", path, endpoint, self._explain(endpoint, exc)[1])
            return None
        finally:
            self._drop(endpoint)

    async def _get(self, endpoint: Endpoint, path: str, unless: int = 0) -> bytes | None:
        """The body of a 2xx answer; None if the status is `unless`."""
        head = f"GET {path} HTTP/1.1\r\nHost: {endpoint}\r\n{self._fields}\r\n\r\n".encode()
        link = self._take(endpoint) or await self._dialer.open(endpoint)
        try:
            try:
                answer = await link.get(head)
            except ConnectionError:
                if not link.used:
                    raise
                # The engine closed a connection that it had kept open: no word on this request.
                link = await self._dialer.open(endpoint)
                answer = await link.get(head)
        except BaseException as exc:
            link.close()
            if isinstance(exc, BadAnswer) and exc.fault == "too_large":
                raise _ProbeFailed(
                    "too_large", f"{path} answers with more than {MAX_ANSWER_BYTES} bytes"
                ) from None
            raise
        self._keep(endpoint, link)
        if answer.status == unless:
            return None
        if not 200 <= answer.status < 300:
            raise _bad_status(path, answer.status)
        return bytes(answer.body)

    def _take(self, endpoint: Endpoint) -> Link | None:
        link, timer = self._idle.pop(endpoint, (None, None))
        if timer is not None:
            timer.cancel()
        return link if link is not None and link.usable else None

    def _keep(self, endpoint: Endpoint, link: Link) -> None:
        if not link.usable:
            link.close()
            return
        self._drop(endpoint)
        timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._drop, endpoint)
        self._idle[endpoint] = link, timer

    def _drop(self, endpoint: Endpoint) -> None:
        link = self._take(endpoint)
        if link is not None:
            link.close()

    def _explain(self, endpoint: Endpoint, exc: Exception) -> tuple[str, str]:
        """(fault, reason); the reason holds nothing that differs from probe to probe."""
        match exc:
            case _ProbeFailed():
                return exc.fault, exc.reason
            case TimeoutError():
                return "timeout", f"no answer within {self._timeout_s:g} s"
            case HostRefused():
                return "forbidden", f"its name resolves to an address where no instance may be: {exc}"
            case BadAnswer():
                return "malformed", "its answer is not HTTP, or is cut short"
            case socket.gaierror() | UnicodeError():
                return "name", "its host name cannot be resolved"
            case ssl.SSLError():
                return "tls", "no TLS connection can be made, or its certificate is not valid"
            case ConnectionRefusedError():
                return "refused", "connection refused"
            case ConnectionError():
                return "disconnected", "it closed the connection without an answer"
            case OSError():
                return "unreachable", "no connection can be made"
        log.error("probe of %s failed unexpectedly", endpoint, exc_info=exc)
        return "unexpected", f"the probe failed: {type(exc).__name__}"


def _bad_status(path: str, status: int) -> _ProbeFailed:
    if 300 <= status < 400:
        return _ProbeFailed("redirect", f"{path} answers with a redirect, which is not followed")
    hint = " (does it need --engine-api-key?)" if status in (401, 403) else ""
    return _ProbeFailed("status", f"{path} answers {status}{hint}")


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
    # Names take no more room in a record than in the answer that named them.
    large = len(body) > MAX_NAMES_BYTES and len(encode_record([models, lora_adapters])) > MAX_NAMES_BYTES
    if too_many or large:
        bound = f"{MAX_MODELS} models, {MAX_LORA_ADAPTERS} LoRA adapters, {MAX_NAMES_BYTES} bytes"
        raise _ProbeFailed("too_large", f"/v1/models lists too many names, over {bound}")
    owner = next((model.owned_by for model in listed if not model.parent and model.owned_by), "")
    return Verdict(models=models, lora_adapters=lora_adapters, owner=owner, engine=engine_of_owner(owner))
