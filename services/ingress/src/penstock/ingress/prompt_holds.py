"""What prefill instances keep for requests in hand, and whether it outlives its lease."""

from __future__ import annotations

from penstock.common.model import InstanceId

# What is kept so long after its lease is a leak.
GRACE_S = 1.0


class PromptHolds:
    """By transfer: what is kept, at which instance, until when. One lease for all, so they end in order; no
    more than requests in hand. `now` is a monotonic clock in seconds."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        # Until when, at whom; and once somebody was told to fetch, whether he answers in a stream.
        self._held: dict[str, tuple[float, InstanceId, bool | None]] = {}
        # Of those whose answer comes in one piece: how many outlived their lease before it came. Whether they
        # were fetched is not to be seen here; engines count what nobody fetched.
        self.unseen = 0

    def __len__(self) -> int:
        return len(self._held)

    def begin(self, transfer_id: str, prefill: InstanceId, now: float) -> None:
        """Prefill keeps a prompt for decode to fetch."""
        self._held[transfer_id] = now + self._lease_s, prefill, None

    def passed(self, transfer_id: str, *, stream: bool) -> None:
        """Decode was told to fetch it, and will answer in a stream or in one piece. One that is not there is
        no fault."""
        held = self._held.get(transfer_id)
        if held is not None:
            self._held[transfer_id] = *held[:2], stream

    def end(self, transfer_id: str) -> None:
        """It was fetched, or given up. One that is not there is no fault."""
        self._held.pop(transfer_id, None)

    def leaked(self, now: float) -> list[tuple[str, InstanceId]]:
        """Those that decode, asked for a stream, has neither fetched nor refused GRACE_S past their lease,
        each once. What was passed to nobody ends with its lease: it is passed to nobody any more."""
        over = [(one, held) for one, held in self._held.items() if held[0] + GRACE_S <= now]
        for transfer_id, (_, _, stream) in over:
            del self._held[transfer_id]
            self.unseen += stream is False
        return [(transfer_id, prefill) for transfer_id, (_, prefill, stream) in over if stream]
