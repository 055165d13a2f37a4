"""Waiting until every part of the stack says that it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import aiohttp

POLL_S = 0.1
ANSWER_S = 2.0

# Why a part is not ready, in words; "" if it is.
Check = Callable[[], Awaitable[str]]


class NotReady(Exception):
    """The time was up; `missing` says for each part what it lacks."""

    def __init__(self, missing: Mapping[str, str]) -> None:
        self.missing = dict(missing)
        super().__init__("; ".join(f"{name}: {text}" for name, text in missing.items()))


async def until_ready(
    checks: Mapping[str, Check],
    on_ready: Callable[[str], None],
    still_possible: Callable[[], None],
    limit_s: float,
) -> None:
    """Ask all, again and again. `still_possible` raises to end the waiting. Raises NotReady."""
    missing = dict.fromkeys(checks, "was not asked")
    try:
        async with asyncio.timeout(limit_s):
            while True:
                names = list(missing)
                texts = await asyncio.gather(*(checks[name]() for name in names))
                for name, text in zip(names, texts, strict=True):
                    if text:
                        missing[name] = text
                    else:
                        del missing[name]
                        on_ready(name)
                if not missing:
                    return
                still_possible()
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise NotReady(missing) from None


async def service_missing(session: aiohttp.ClientSession, admin_url: str) -> str:
    """What a service's /readyz says that it lacks."""
    try:
        async with asyncio.timeout(ANSWER_S), session.get(f"{admin_url}/readyz") as response:
            if response.status == 200:
                return ""
            body = await response.json()
            return "; ".join(map(str, body["missing"]))
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as exc:
        return f"does not answer at {admin_url}: {exc or type(exc).__name__}"


async def models_served(session: aiohttp.ClientSession, base_url: str) -> list[str]:
    """Names in /v1/models of a gateway or an engine; none if it does not answer so."""
    try:
        async with asyncio.timeout(ANSWER_S), session.get(f"{base_url}/v1/models") as response:
            body = await response.json() if response.status == 200 else {}
            return [str(model["id"]) for model in body["data"]]
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
        return []


async def engines_missing(session: aiohttp.ClientSession, urls: tuple[str, ...]) -> str:
    """Which engines do not answer."""
    answers = await asyncio.gather(*(models_served(session, url) for url in urls))
    silent = [url for url, models in zip(urls, answers, strict=True) if not models]
    return f"{len(silent)} do not answer, the first is {silent[0]}" if silent else ""
