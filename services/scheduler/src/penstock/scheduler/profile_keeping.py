"""Keeps the catalog in step with the config profiles, and tells what changes and what cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

from penstock.common.bus import Bus
from penstock.common.config_keeping import follow_config
from penstock.common.followed_file import follow_file
from penstock.common.live_config import PROFILE, Changed, LiveConfig, expose_config
from penstock.common.model import Instance
from penstock.common.profile_sources import FILE, ProfileSources
from penstock.common.telemetry import Metrics
from penstock.scheduler.policies.configured import ConfiguredCatalog
from penstock.scheduler.telling import Teller


class ProfileKeeper:
    """`loops` run for ever; `registry` is called whenever the registry changed."""

    def __init__(
        self, bus: Bus, catalog: ConfiguredCatalog, teller: Teller, metrics: Metrics, path: Path | None
    ) -> None:
        self._bus, self._catalog, self._teller, self._path = bus, catalog, teller, path
        self._sources = ProfileSources(catalog.fault)
        self._config = LiveConfig()
        self._told: dict[str, str] = {}
        self._file_version = 0
        self._file_read = False
        expose_config(self._config, metrics)
        for name, text, read in (
            ("models", "Models with config profiles, any model as one", lambda: len(self._sources.models())),
            ("faults", "Config profiles that cannot be used as written", lambda: len(self._told)),
        ):
            metrics.gauge(f"penstock_scheduler_profile_{name}", text, read)

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """What has to run, by name."""
        yield "profiles", follow_config(self._bus, self._config, self._on_config)
        if self._path is not None:
            yield "profiles-file", self._follow_file(self._path)

    def registry(self, instances: Iterable[Instance]) -> None:
        """Read what the instances bring along."""
        if self._sources.take_instances(instances):
            self._apply()

    def _on_config(self, changed: Changed) -> None:
        if any(kind == PROFILE for kind, _ in changed):
            self._sources.take_documents(self._config.documents(PROFILE))
            self._apply()

    async def _follow_file(self, path: Path) -> None:
        async for content in follow_file(path):
            changed = self._sources.take_file(content)
            self._apply()
            self._file_version += 1
            if self._file_read:
                for model, change in changed:
                    self._teller.profile(model, change, self._file_version, FILE)
            self._file_read = True

    def _apply(self) -> None:
        self._catalog.configure(self._sources.models(), self._sources)
        faults = self._sources.faults
        for what in self._told.keys() - faults.keys():
            self._teller.degraded(what, False, "", f"{what} can be used again", logging.INFO)
        for what, cause in faults.items():
            if self._told.get(what) != cause:
                self._teller.degraded(what, True, cause, f"{what} cannot be used as they are written")
        self._told = faults
