"""The file of config profiles, for those who place requests and those who divide them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from penstock.common.followed_file import read_bytes
from penstock.common.profiles import ModelProfiles, read_file
from penstock.common.settings import Settings


class ProfilesFileSettings(Settings):
    """Where the config profiles stand that are not live configuration."""

    profiles_file: Path | None = Field(
        None,
        description="YAML file with config profiles by model, read again when it changes; see the guide on "
        "profiles",
    )

    def profiles(self) -> Mapping[str, ModelProfiles]:
        """The file's, as it stands. Raises OSError, ValueError."""
        return read_file(read_bytes(self.profiles_file)) if self.profiles_file else {}
