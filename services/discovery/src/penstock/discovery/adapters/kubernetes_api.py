"""The Kubernetes API over HTTP (kubernetes-asyncio): credentials, requests, and why one failed.

The library finds and renews credentials; its watch helper and models are not used, because they hide resource
versions, bookmarks and expiry, and build hundreds of objects per pod.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.client.rest import RESTClientObject
from kubernetes_asyncio.config import ConfigException, load_kube_config
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader

from penstock.common.codec import DecodeError, decode_record
from penstock.discovery.kubernetes_objects import Status

log = logging.getLogger(__name__)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_RETRY_AFTER_S = 30.0
MAX_ERROR_BYTES = 64 * 1024
# A kubeconfig may start a plugin that asks somebody for a token.
CREDENTIALS_TIMEOUT_S = 30.0
# Failing requests do not have credentials loaded again within this time; refused ones do.
CREDENTIALS_KEPT_S = 60.0


class ApiFault(Exception):
    """The API did not do what was asked; the reason is for people and holds no secret."""

    def __init__(self, reason: str, *, status: int = 0, retry_after_s: float = 0.0) -> None:
        self.status, self.retry_after_s = status, retry_after_s
        super().__init__(reason)


@dataclass(frozen=True)
class Credentials:
    """How the API is reached, and the namespace that they are for."""

    configuration: Configuration
    namespace: str


Load = Callable[[], Awaitable[Credentials]]


async def in_cluster(folder: Path = SERVICE_ACCOUNT, environ: Mapping[str, str] | None = None) -> Credentials:
    """The service account of the pod that this process runs in.

    Raises:
        ConfigException: it runs in no pod, or its files are not there.
    """
    configuration = Configuration()
    token, certificates = str(folder / "token"), str(folder / "ca.crt")
    given: dict[str, Any] = {} if environ is None else {"environ": dict(environ)}
    InClusterConfigLoader(token, certificates, **given).load_and_set(configuration)
    try:
        namespace = (folder / "namespace").read_text().strip()
    except OSError:
        namespace = ""
    return Credentials(configuration, namespace or "default")


async def from_kubeconfig(path: Path | None, context: str) -> Credentials:
    """A kubeconfig's context; `path` None for $KUBECONFIG, else ~/.kube/config.

    Raises:
        ConfigException: it does not say what is needed.
    """
    configuration = Configuration()
    loader = await load_kube_config(
        config_file=str(path) if path else None,
        context=context or None,
        client_configuration=configuration,
        # The user's file is the user's.
        persist_config=False,
    )
    current = loader.current_context or {}
    return Credentials(configuration, current.get("context", {}).get("namespace") or "default")


def credentials_of(path: Path | None, context: str) -> Load:
    """What finds the credentials: a file that is named, else the pod's, else the user's."""

    async def load() -> Credentials:
        if path or context:
            return await from_kubeconfig(path, context)
        try:
            return await in_cluster()
        except ConfigException as exc:
            outside = str(exc)
        try:
            return await from_kubeconfig(None, "")
        except ConfigException as exc:
            raise ConfigException(f"not in a pod ({outside}), and no kubeconfig ({exc})") from None

    return load


class KubernetesApi:
    """GET requests with credentials that are loaded at first use and again when they are refused."""

    def __init__(self, load: Load, timeout_s: float) -> None:
        """`timeout_s` bounds the wait for an answer's head."""
        self._load, self._timeout_s = load, timeout_s
        self._client: _Client | None = None
        self._lock = asyncio.Lock()

    async def namespace(self) -> str:
        """The credentials' own. Raises ApiFault."""
        return (await self._connected()).credentials.namespace

    @asynccontextmanager
    async def get(self, path: str, query: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200, its body unread. Raises ApiFault for any other."""
        client = await self._connected()
        response = await self._send(client, path, query)
        if response.status == 401:
            # A token that was replaced is read again once before anything is said of it.
            response.close()
            await self._renew(client)
            response = await self._send(await self._connected(), path, query)
        async with response:
            if response.status != 200:
                raise await _refusal(response)
            yield response

    async def close(self) -> None:
        """Close all connections."""
        async with self._lock:
            client, self._client = self._client, None
        if client:
            await client.rest.close()

    async def _connected(self) -> _Client:
        async with self._lock:
            if self._client is None:
                self._client = await self._load_client()
            return self._client

    async def _load_client(self) -> _Client:
        try:
            async with asyncio.timeout(CREDENTIALS_TIMEOUT_S):
                credentials = await self._load()
            # Many clusters' own certificates lack extensions that strict checking (Python 3.13) asks for.
            credentials.configuration.disable_strict_ssl_verification = True
            return _Client(credentials)
        except ConfigException as exc:
            raise ApiFault(f"no credentials: {str(exc)[:300]}") from exc
        except Exception as exc:  # a kubeconfig can be wrong in any way
            # The text of such an error may quote the file.
            raise ApiFault(f"no credentials: they cannot be loaded ({type(exc).__name__})") from exc

    async def _renew(self, used: _Client) -> None:
        """Load the credentials again for the next request, unless another request did meanwhile."""
        async with self._lock:
            if self._client is not used:
                return
            self._client = None
        await used.rest.close()

    async def _send(self, client: _Client, path: str, query: Mapping[str, str]) -> aiohttp.ClientResponse:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await client.get(path, query)
        except TimeoutError:
            reason = f"the API does not answer within {self._timeout_s:g} s"
        except aiohttp.ClientConnectorCertificateError as exc:
            reason = f"the API's certificate is not trusted: {exc.certificate_error}"
        except aiohttp.ClientConnectorError as exc:
            reason = (
                f"the API cannot be reached at {exc.host}:{exc.port}: {exc.os_error.strerror or exc.os_error}"
            )
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            reason = f"the API's connection failed: {type(exc).__name__}"
        except Exception as exc:  # the library reads token files and starts plugins on the way
            reason = f"the request cannot be made: {type(exc).__name__}"
            log.warning("kubernetes: %s", reason, exc_info=exc)
        # Address and certificates may have changed as well. A plugin that makes them is not run all the time.
        if asyncio.get_running_loop().time() - client.loaded_at > CREDENTIALS_KEPT_S:
            await self._renew(client)
        raise ApiFault(reason)


class _Client:
    """A session of the library and the credentials it was made from."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.loaded_at = asyncio.get_running_loop().time()
        self.rest = RESTClientObject(credentials.configuration)

    async def get(self, path: str, query: Mapping[str, str]) -> aiohttp.ClientResponse:
        """One request, redirects not followed: the token is for this server."""
        configuration = self.credentials.configuration
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "penstock-discovery",
        }
        # Reads the service account's token again when it is older than a minute.
        if token := await configuration.get_api_key_with_prefix("BearerToken"):
            # A token file often ends in a line break, which no header may hold.
            headers["Authorization"] = " ".join(token.split())
        session: aiohttp.ClientSession = self.rest.pool_manager
        return await session.get(
            (configuration.host or "").rstrip("/") + path,
            params=query,
            headers=headers,
            allow_redirects=False,
            proxy=configuration.proxy,
            server_hostname=configuration.tls_server_name,
            # Deadlines are the caller's: a watch lasts.
            timeout=aiohttp.ClientTimeout(total=None),
        )


async def _refusal(response: aiohttp.ClientResponse) -> ApiFault:
    message = ""
    try:
        async with asyncio.timeout(1.0):
            status = decode_record(Status, await response.content.read(MAX_ERROR_BYTES))
            message = f": {status.message[:300]}" if status.message else ""
    except (DecodeError, TimeoutError, aiohttp.ClientError, OSError):
        # Proxies answer with pages of their own; the number has to do.
        message = ""
    asked = response.headers.get("Retry-After", "")
    retry_after_s = min(float(asked), MAX_RETRY_AFTER_S) if asked.isdigit() else 0.0
    return ApiFault(
        f"the API answers {response.status}{message}", status=response.status, retry_after_s=retry_after_s
    )
