"""Small records of which there are many: entries of the ledger's books, heads of messages."""

from __future__ import annotations

from typing import Annotated

import msgspec

from penstock.common.messages import MAX_BATCH, Count
from penstock.common.model import InstanceId, ShortName


class Work(msgspec.Struct, gc=False):
    """One decision. `pending` are the prompt tokens to compute before its first answer, 0 after it.
    `sequence` is that of the report it stands for; 0: a placement, until `deadline`."""

    instance: InstanceId
    tokens: int
    pending: int
    sequence: int
    deadline: float = 0.0


class Load(msgspec.Struct, gc=False):
    requests: int = 0
    tokens: int = 0
    pending: int = 0


class Orphan(msgspec.Struct, frozen=True):
    """A decision of an ingress that is gone and had not finished it, as far as is known; without a decision:
    the ingress itself."""

    ingress: str
    incarnation: str
    cause: str
    decision_id: str = ""
    instance: str = ""


class Books(msgspec.Struct):
    """What one incarnation of an ingress said. `missing` is the last sequence known to be lost (0: none);
    `floor` the first of the last complete snapshot, `open` that of the one under way; `risen_at` is when
    `sequence`, the highest, last rose."""

    incarnation: str
    heard_at: float
    risen_at: float
    work: dict[str, Work]
    sequence: int = 0
    missing: int = 0
    floor: int = 0
    open: int = 0
    open_pieces: int = 0
    # Instances by decisions that it was answered and did not report, the last ones: it may have died first.
    unconfirmed: dict[str, str] = {}


class FeedHead(msgspec.Struct, frozen=True, array_like=True):
    """A PlacedFeed whose placements are counted, not read."""

    replica: ShortName
    incarnation: ShortName
    first_sequence: Count
    placed: Annotated[tuple[msgspec.Raw, ...], msgspec.Meta(max_length=MAX_BATCH)]
