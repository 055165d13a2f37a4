"""Settings of `penstock audit verify` and `penstock audit export`."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from pydantic import Field, field_validator

from penstock.cli.durations import moment_of
from penstock.common.settings import BusSettings


class RangeSettings(BusSettings):
    """Which part of the log is read."""

    since: float | None = Field(
        None,
        description="begin with this moment: how long ago, as in 10m or 2h, or a date; else with the oldest",
    )

    @field_validator("since", mode="before")
    @classmethod
    def _since(cls, value: object) -> object:
        return None if value is None else moment_of(str(value), time.time())


with warnings.catch_warnings():
    # pydantic warns that `json` hides a deprecated method of its base, which nothing calls.
    warnings.simplefilter("ignore", UserWarning)

    class VerifySettings(RangeSettings):
        """Whether the routing log is whole: no number of a writer missing, no message changed, each admitted
        request decided and ended. Exit codes: 0 whole, 1 not, 2 the log could not be read."""

        settle: float = Field(
            15.0,
            ge=0,
            le=3600,
            description="seconds at the end of the log in which what belongs together need not be there yet",
        )
        json: bool = Field(False, description="print JSON")  # type: ignore[assignment]  # the flag is --json


class ExportSettings(RangeSettings):
    """The routing log as a file: one event a line, and after them a line that says what they are."""

    until: float | None = Field(
        None, description="end with this moment, given as for --since; else with the newest event"
    )
    out: Path | None = Field(None, description="file to write; else events go to the standard output")
    resume: bool = Field(
        False, description="go on with the file of --out behind the last line that says what is in it"
    )
    model: str = Field("", description="only events of this model")
    type: str = Field("", description="only events of this type")

    @field_validator("until", mode="before")
    @classmethod
    def _until(cls, value: object) -> object:
        return None if value is None else moment_of(str(value), time.time())
