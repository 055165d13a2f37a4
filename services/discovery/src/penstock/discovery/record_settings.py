"""The one setting of all sources that read records out of a key-value store."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from penstock.common.settings import Settings


class RecordSettings(Settings):
    """How records are written in Redis and etcd."""

    discovery_record_format: Literal["penstock", "llumnix"] = Field(
        "penstock",
        description="format of the records in Redis and etcd: Penstock's JSON, or the protobuf messages and "
        "keys of Llumnix's discovery sidecars",
    )
