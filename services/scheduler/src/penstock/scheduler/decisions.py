"""Decisions as values: what one is, what it was made on and why, and as it is kept.

Records of msgspec stand apart from the code that makes them, which can be compiled (decision 0050).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.routing_events import CandidateTerms, Inputs, ViewAge
from penstock.scheduler.chain import Hashes
from penstock.scheduler.draws import seed_of
from penstock.scheduler.pool import Kept

if TYPE_CHECKING:
    from penstock.scheduler.policies.custom import PolicyFault
    from penstock.scheduler.profile import Profile

# What a page takes beside its bytes.
PAGE_BYTES = 1000


class Case(msgspec.Struct, frozen=True, gc=False):
    """One request to decide; with the candidates' numbers it determines the choice.

    `hashes` are its block hashes, `seed` the source of all chance, `turn` the number of placements that
    this replica made in the pool, `replicas` how many schedulers are alive, this one included.
    """

    request: ScheduleRequest
    hashes: Hashes
    seed: int
    turn: int = 0
    replicas: int = 1
    # Stands for the request's session where that is not told; 0: see `session_key`.
    session_seed: int = 0

    @property
    def session_key(self) -> int:
        """64 bits that stand for the session, 0 without one."""
        session = self.request.session
        return self.session_seed or (seed_of(session) if session else 0)


class Basis(msgspec.Struct, frozen=True, gc=False):
    """What a choice was made on; `steps` is the prefix index's answer. The numbers are the view's."""

    case: Case
    profile: Profile
    kept: Kept
    steps: Sequence[tuple[int, int]] = ()


class Decision(msgspec.Struct, frozen=True):
    """What was decided and why. `policy` is its label in metrics; `slot` is -1 for a rejection; `terms` are
    the best candidates, the chosen one first; `fault` is why the policy asked for did not decide; `basis` is
    None if no instance was looked at."""

    outcome: Placement | Rejection
    policy: str
    slot: int = -1
    hashes: Hashes = ()
    terms: list[CandidateTerms] = []
    excluded: dict[str, int] = {}
    seed: int = 0
    fault: PolicyFault | None = None
    basis: Basis | None = None
    # The choice of prefill's instance, where `outcome` names two.
    prefill: Decision | None = None


class Reasons(msgspec.Struct, frozen=True, gc=False):
    """Why a decision was made, as its event says it."""

    policy: str
    terms: list[CandidateTerms]
    excluded: dict[str, int]
    seed: int
    weights: dict[str, float]
    view: ViewAge
    fault: str = ""
    inputs: Inputs | None = None


class Facts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What of a decision is kept packed: `numbers` are the arrays of Loads that its profile reads, by slot,
    `steps` the prefix index's answer with slots as little-endian bits, `score` is that of the instance
    chosen, `prefill` the choice of prefill's instance, where `outcome` names two. Hashes are the request's:
    unpacked they take eight times as much."""

    request: ScheduleRequest
    outcome: Placement | Rejection
    policy: str
    seed: int
    excluded: dict[str, int] = {}
    score: float = 0.0
    fault: str = ""
    steps: list[tuple[int, bytes]] = []
    turn: int = 0
    replicas: int = 1
    numbers: tuple[bytes, ...] = ()
    prefill: Facts | None = None


# Of a choice: profile and candidates; without them no instance was looked at. Those of many are the same.
MadeBy = tuple["Profile", Kept] | None


class Recording(msgspec.Struct, frozen=True, gc=False):
    """One decision with what it was made on."""

    facts: Facts
    ingress: str
    view: ViewAge
    made_by: MadeBy = None
    # Of prefill's instance, where the outcome names two.
    prefill: Recording | None = None


class Page(msgspec.Struct, frozen=True, gc=False):
    """The recordings of one message: `packed` is a list of their Facts in MessagePack, `made_by` and
    `prefill_by` stand beside it, the latter empty where nothing was divided.

    Ten thousand decisions are kept. As objects they leave the processor's cache, and each has to come back to
    be freed: that costs as much as to make them. Of a page there is one object to free."""

    ingress: str
    view: ViewAge
    packed: bytes
    made_by: tuple[MadeBy, ...]
    prefill_by: tuple[MadeBy, ...] = ()

    @property
    def held_bytes(self) -> int:
        """What it takes in memory, about."""
        return len(self.packed) + PAGE_BYTES
