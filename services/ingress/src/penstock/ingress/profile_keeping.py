"""Keeps the config profiles of one ingress process in step with their sources, as schedulers do theirs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from penstock.common.followed_file import follow_file
from penstock.common.live_config import PROFILE, Changed, LiveConfig
from penstock.common.model import Instance
from penstock.common.profile_sources import Check, ProfileSources
from penstock.common.profiles import ModelProfiles

log = logging.getLogger(__name__)

Apply = Callable[[Mapping[str, ModelProfiles]], None]
Degraded = Callable[[str, bool, str], None]


class ProfileKeeper:
    """`apply` gets the profiles of all models, ANY_MODEL among them, whenever they may have changed. What
    cannot be used leaves the last that could be, and is told by `degraded`."""

    def __init__(
        self, live: LiveConfig, path: Path | None, check: Check, apply: Apply, degraded: Degraded
    ) -> None:
        self._live, self._path, self._apply, self._degraded = live, path, apply, degraded
        self._sources = ProfileSources(check)
        self._told: dict[str, str] = {}

    def changed(self, changed: Changed) -> None:
        """The live configuration has changed."""
        if any(kind == PROFILE for kind, _ in changed):
            self._sources.take_documents(self._live.documents(PROFILE))
            self._tell()

    def registry(self, instances: Iterable[Instance]) -> None:
        """Read what the instances bring along."""
        if self._sources.take_instances(instances):
            self._tell()

    async def follow_file(self) -> None:
        """An eternal loop, if there is a file."""
        if self._path is None:
            return
        async for content in follow_file(self._path):
            self._sources.take_file(content)
            self._tell()

    def _tell(self) -> None:
        self._apply(self._sources.models())
        faults = self._sources.faults
        for what in self._told.keys() - faults.keys():
            log.info("%s can be used again", what)
            self._degraded(what, False, "")
        for what, cause in faults.items():
            if self._told.get(what) != cause:
                log.warning("%s cannot be used as they are written", what, extra={"fields": {"cause": cause}})
                self._degraded(what, True, cause)
        self._told = faults
