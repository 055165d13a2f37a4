"""What the bench can be told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator

from penstock.cli.bench.way import WAYS
from penstock.common.settings import Settings

PROG = "python -m penstock.cli.bench"
QUICK_SECONDS, QUICK_ROUNDS = 0.3, 2
MEASURES = ("chat-1k", "chat-16k", "latency", "paced", "fast", "memory", "hostile")

with warnings.catch_warnings():
    # pydantic warns that `json` hides a deprecated method of its base, which nothing calls.
    warnings.simplefilter("ignore", UserWarning)

    class BenchSettings(Settings):
        """Measure the gateway beside nginx and beside direct calls, in short rounds of random order.

        `make bench ARGS="--quick"`; with `make bench PEERS=1`, other routers join.
        """

        seconds: float = Field(2.0, ge=0.1, le=600, description="seconds of each measurement")
        rounds: int = Field(3, ge=1, le=1000, description="times that each measurement is repeated")
        quick: bool = Field(
            False,
            description=f"{QUICK_ROUNDS} rounds of {QUICK_SECONDS} s each, unless told otherwise: a look",
        )
        ways: str = Field("", description=f"only some of {', '.join(WAYS)}; all if empty")
        measures: str = Field("", description=f"only some of {', '.join(MEASURES)}; all if empty")
        connections: int = Field(64, ge=1, le=10_000, description="connections of the chats, always busy")
        rate: float = Field(200.0, gt=0, le=10_000, description="requests a second where latency is measured")
        streams: int = Field(64, ge=1, le=10_000, description="streams side by side")
        pace_ms: int = Field(
            20, ge=1, le=999, description="milliseconds between two chunks of a paced stream"
        )
        open_streams: int = Field(1000, ge=1, le=20_000, description="streams that memory is measured with")
        engines: int = Field(4, ge=1, le=64, description="engines that the responder stands for")
        access_log: bool = Field(False, description="let the gateway and nginx log every request")
        peers: bool = Field(
            False, description="let sglang-router and vllm-router join, installed in .bench by pip"
        )
        seed: int | None = Field(None, description="order of the measurements; random, and printed, if none")
        json: Path | None = Field(None, description="file for every figure of every round")  # type: ignore[assignment]  # the flag is --json

        @field_validator("ways")
        @classmethod
        def _known_ways(cls, value: str) -> str:
            return _known(value, WAYS)

        @field_validator("measures")
        @classmethod
        def _known_measures(cls, value: str) -> str:
            return _known(value, MEASURES)

        @property
        def slot_s(self) -> float:
            """Seconds of a measurement."""
            return self._unless_quick("seconds", QUICK_SECONDS)

        @property
        def repeats(self) -> int:
            """Rounds."""
            return int(self._unless_quick("rounds", QUICK_ROUNDS))

        def _unless_quick(self, name: str, quick: float) -> float:
            asked = name in self.model_fields_set or not self.quick
            return float(getattr(self, name)) if asked else quick


def chosen(value: str, known: Sequence[str]) -> list[str]:
    """Names of a comma-separated list; all that are known if it is empty."""
    return [name.strip() for name in value.split(",") if name.strip()] or list(known)


def _known(value: str, known: Sequence[str]) -> str:
    unknown = [name for name in chosen(value, known) if name not in known]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return value
