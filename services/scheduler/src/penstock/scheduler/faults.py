"""Policies of the operator's own that fail: counted each time, told when it begins and when it ends."""

from __future__ import annotations

import logging

from penstock.common.telemetry import Counter
from penstock.scheduler.policies.custom import PolicyFault
from penstock.scheduler.telling import Teller

# A policy that did not fail for so long decides again, or is not asked for any more.
QUIET_S = 30.0


class PolicyFaults:
    """`now` is a monotonic clock in seconds. As many entries as the operator has policies."""

    def __init__(self, teller: Teller, count: Counter) -> None:
        self._teller, self._count = teller, count
        self._failed_at: dict[str, float] = {}

    def failed(self, fault: PolicyFault, now: float) -> None:
        """It may thousands of times a second, so that it is told once."""
        self._count.inc(fault.policy, fault.kind)
        if fault.policy not in self._failed_at:
            text = "a policy failed, least-request decides in its place"
            cause = f"{fault.kind}: {fault.detail}"
            self._teller.degraded(f"policy {fault.policy}", True, cause, text, logging.ERROR)
        self._failed_at[fault.policy] = now

    def expire(self, now: float) -> None:
        """Tell of those that ceased to fail."""
        for policy in [policy for policy, at in self._failed_at.items() if now - at >= QUIET_S]:
            del self._failed_at[policy]
            text = f"a policy that failed has not for {QUIET_S:g} s"
            self._teller.degraded(f"policy {policy}", False, "", text, logging.INFO)
