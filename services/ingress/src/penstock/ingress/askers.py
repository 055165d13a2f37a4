"""Who asks for placements, as those see them who find them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Instance

if TYPE_CHECKING:
    from penstock.ingress.traced import Trace


class Asker(Protocol):
    """What waits for a placement."""

    request: ScheduleRequest
    # Of the same request, this one's last.
    decisions: list[str]
    trace: Trace | None

    @property
    def waiting(self) -> bool:
        """Whether it still wants one."""

    def placed(self, placement: Placement, instance: Instance) -> None:
        """Go to `instance`."""

    def rejected(self, rejection: Rejection) -> None:
        """Go nowhere."""

    def broken(self) -> None:
        """End after a fault of this program, in whatever state."""
