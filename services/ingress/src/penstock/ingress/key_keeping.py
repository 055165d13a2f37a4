"""Keeps the API keys in step with their file and the live configuration, and tells what cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from penstock.common.followed_file import follow_file
from penstock.common.live_config import KEY, Changed, LiveConfig
from penstock.ingress.api_keys import LIVE, ApiKey, ApiKeys, BadKeys, read_key, read_keys

log = logging.getLogger(__name__)

_FILE = "the API keys' file"
_MAX_CAUSE = 500

Degraded = Callable[[str, bool, str], None]


class KeyKeeper:
    """Keys of the file count before those of the live configuration. What cannot be used leaves the last."""

    def __init__(
        self,
        keys: ApiKeys,
        source: str,
        live: LiveConfig,
        degraded: Degraded,
        applied: Callable[[], None] = lambda: None,
    ) -> None:
        """`source` is a path, or LIVE; `applied` is called when keys have changed."""
        self._keys, self._live, self._degraded, self._applied = keys, live, degraded, applied
        self._path = None if source == LIVE else Path(source)
        self._of_file: Mapping[str, ApiKey] = {}
        self._of_live: dict[str, ApiKey] = {}
        self._versions: dict[str, int] = {}
        self._told: dict[str, str] = {}

    def missing(self) -> str:
        """Why no key is known yet, in words; empty once some may be."""
        if self._path is None and not self._live.synced:
            return "the API keys of live configuration are not listed yet"
        return ""

    def changed(self, changed: Changed) -> None:
        """The live configuration has changed."""
        if not any(kind == KEY for kind, _ in changed):
            return
        documents = self._live.documents(KEY)
        for name in self._versions.keys() - documents.keys():
            del self._versions[name]
            self._of_live.pop(name, None)
            self._tell(f"API key {name}", "")
        for name, document in documents.items():
            if self._versions.get(name) == document.version:
                continue
            self._versions[name] = document.version
            try:
                self._of_live[name] = read_key(document.value)
                self._tell(f"API key {name}", "")
            except BadKeys as exc:
                self._tell(f"API key {name}", str(exc))
        self._apply()

    async def follow_file(self) -> None:
        """An eternal loop, if there is a file."""
        if self._path is None:
            return
        async for content in follow_file(self._path):
            try:
                if isinstance(content, str):
                    raise BadKeys(content)
                self._of_file = read_keys(content)
                self._tell(_FILE, "")
            except BadKeys as exc:
                self._tell(_FILE, str(exc))
            self._apply()

    def _apply(self) -> None:
        self._keys.replace((self._of_file, self._of_live))
        self._applied()
        log.info("API keys", extra={"fields": {"hashes": len(self._keys)}})

    def _tell(self, what: str, cause: str) -> None:
        cause = cause[:_MAX_CAUSE]
        if self._told.get(what, "") == cause:
            return
        if cause:
            self._told[what] = cause
            log.warning(
                "%s cannot be used, the last good one counts", what, extra={"fields": {"cause": cause}}
            )
        else:
            del self._told[what]
            log.info("%s can be used again", what)
        self._degraded(what, bool(cause), cause)
