"""Policies of the operator's own: a function in plain Python that rates candidates (docs/guide/policies.md).

What it returns is checked, what it raises is caught: a fault costs this decision its policy, not an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from penstock.common.messages import ScheduleRequest
from penstock.common.model import Instance
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.policies.measures import ExpectedTtft
from penstock.scheduler.pool import Floats

# Stands among the arrays that a policy reads for the instances' records.
RECORDS = "records"


class PolicyFault(Exception):
    """A policy did not rate the candidates. `kind` is one of: raised, shape, type, not-finite, range."""

    def __init__(self, policy: str, kind: str, detail: str) -> None:
        self.policy, self.kind, self.detail = policy, kind, detail
        super().__init__(f"policy {policy}: {kind}: {detail}")


class CandidateView:
    """The candidates of one request as a policy of the operator's sees them: arrays aligned with `ids`.

    Each array is the caller's own. Stale numbers were replaced by their fallback (see Loads)."""

    def __init__(self, case: Case, candidates: Candidates) -> None:
        self._case, self._candidates = case, candidates

    def __len__(self) -> int:
        return len(self._candidates)

    @property
    def ids(self) -> tuple[str, ...]:
        """Instance ids."""
        return tuple(instance.id for instance in self.instances)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Registry records: labels, group, weight, engine."""
        kept = self._candidates.kept
        return tuple(kept.pool.instances[row] for row in kept.rows)

    @property
    def requests(self) -> Floats:
        """In-flight requests."""
        return self._of("requests")

    @property
    def tokens(self) -> Floats:
        """In-flight prompt and output tokens."""
        return self._of("tokens")

    @property
    def prefill_tokens(self) -> Floats:
        """In-flight prompt tokens, not in cache, of requests without a first answer."""
        return self._of("pending")

    @property
    def kv_used(self) -> Floats:
        """Share of the KV cache in use, 0..1."""
        return self._of("kv_used")

    @property
    def ms_per_prompt_token(self) -> Floats:
        """Prefill, ms per token."""
        return self._of("ms_per_token")

    @property
    def ms_per_output_token(self) -> Floats:
        """Decode, ms per token of one stream (TPOT)."""
        return self._of("tpot_ms")

    @property
    def matched_ratio(self) -> Floats:
        """Share of the prompt's leading blocks that each was given before, 0..1."""
        return self._candidates.shares(self._case)

    @property
    def expected_ttft_ms(self) -> Floats:
        """What `cache-aware` goes by."""
        return ExpectedTtft().of(self._case, self._candidates)

    def _of(self, name: str) -> Floats:
        numbers: Floats = getattr(self._candidates.loads, name)[self._candidates.kept.slots]
        return numbers


# Rates each candidate from 0 to 1, 1 the best.
Policy = Callable[[ScheduleRequest, CandidateView], ArrayLike]


@dataclass(frozen=True)
class Custom:
    """A policy of the operator's as a scorer. Raises PolicyFault."""

    name: str
    policy: Policy
    reads: ClassVar[tuple[str, ...]] = (
        *("requests", "tokens", "pending", "kv_used", "ms_per_token", "tpot_ms"),
        *ExpectedTtft.reads,
        RECORDS,
    )

    def score(self, case: Case, candidates: Candidates) -> Floats:
        try:
            answer = self.policy(case.request, CandidateView(case, candidates))
            scores = np.array(answer)
        except (Exception, SystemExit) as exc:  # others' code: whatever it does is its fault
            raise PolicyFault(self.name, "raised", f"{type(exc).__name__}: {exc}"[:200]) from exc
        if scores.dtype.kind not in "biuf":
            raise PolicyFault(self.name, "type", f"scores are numbers, got {scores.dtype}")
        if scores.shape != (len(candidates),):
            raise PolicyFault(self.name, "shape", f"{len(candidates)} candidates, scores of {scores.shape}")
        scores = scores.astype(np.float64)
        if not np.isfinite(scores).all():
            raise PolicyFault(self.name, "not-finite", "a score is NaN or infinite")
        if scores.min() < 0 or scores.max() > 1:
            raise PolicyFault(
                self.name, "range", f"scores from {scores.min():g} to {scores.max():g}, not 0..1"
            )
        return scores
