"""Decisions as values: what one is, what it was made on and why, and as it is kept.

Records of msgspec stand apart from the code that makes them, which can be compiled (decision 0050).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.routing_events import CandidateTerms, Inputs, ViewAge
from penstock.scheduler.draws import seed_of
from penstock.scheduler.pool import Kept

if TYPE_CHECKING:
    from penstock.scheduler.policies.custom import PolicyFault
    from penstock.scheduler.profile import Profile

# What a recording takes beside its arrays and hashes.
RECORDING_BYTES = 1000


class Case(msgspec.Struct, frozen=True, gc=False):
    """One request to decide; with the candidates' numbers it determines the choice.

    `hashes` are its block hashes, `seed` the source of all chance, `turn` the number of placements that
    this replica made in the pool, `replicas` how many schedulers are alive, this one included.
    """

    request: ScheduleRequest
    hashes: Sequence[int]
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
    hashes: Sequence[int] = ()
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


class Recording(msgspec.Struct, frozen=True, gc=False):
    """One decision with what it was made on; `numbers` are the arrays of Loads that its profile reads, by
    slot, `score` is that of the instance chosen. Without a `kept`, no instance was looked at.

    Ten thousand are kept: what each holds leaves the processor's cache, and comes back when it is freed. The
    terms alone, which can be made again, would cost as much time as all the rest."""

    request: ScheduleRequest
    outcome: Placement | Rejection
    policy: str
    seed: int
    ingress: str
    view: ViewAge
    excluded: dict[str, int] = {}
    score: float = 0.0
    fault: str = ""
    profile: Profile | None = None
    kept: Kept | None = None
    steps: Sequence[tuple[int, int]] = ()
    turn: int = 0
    replicas: int = 1
    numbers: Sequence[bytes] = ()
    held_bytes: int = RECORDING_BYTES
    # The choice of prefill's instance, where `outcome` names two.
    prefill: Recording | None = None
