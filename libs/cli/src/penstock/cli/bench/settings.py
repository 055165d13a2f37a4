"""What the bench can be told."""

from __future__ import annotations

import warnings
from pathlib import Path

from pydantic import Field

from penstock.common.settings import Settings

PROG = "python -m penstock.cli.bench"
QUICK_SECONDS, QUICK_ROUNDS = 0.4, 1

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
            False, description=f"{QUICK_ROUNDS} round of {QUICK_SECONDS} s each, unless told otherwise: a look"
        )
        ways: str = Field("", description="only these columns' ways, comma-separated; all if empty")
        measures: str = Field("", description="only these measurements, comma-separated; all if empty")
        connections: int = Field(64, ge=1, le=10_000, description="connections of the chats, always busy")
        rate: float = Field(200.0, gt=0, le=10_000, description="requests a second where latency is measured")
        streams: int = Field(64, ge=1, le=10_000, description="streams side by side")
        pace_ms: int = Field(20, ge=1, le=999, description="milliseconds between two chunks of a paced stream")
        open_streams: int = Field(1000, ge=1, le=20_000, description="streams that memory is measured with")
        engines: int = Field(4, ge=1, le=64, description="engines that the responder stands for")
        access_log: bool = Field(False, description="let the gateway and nginx log every request")
        peers: bool = Field(
            False, description="let sglang-router and vllm-router join, installed in .bench by pip"
        )
        seed: int | None = Field(None, description="order of the measurements; random, and printed, if none")
        json: Path | None = Field(None, description="file for every figure of every round")  # type: ignore[assignment]  # the flag is --json

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
