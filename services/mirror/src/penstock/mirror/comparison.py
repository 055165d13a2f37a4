"""The two halves of a comparison, which come in any order and from different places."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from penstock.common.messages import MirrorCopy, MirrorPrimary
from penstock.common.routing_events import ComparisonEvent, ResponseFigures

# Every replica hears how all requests ended, and sends some of their copies: what waits for its other half
# leaves with the oldest.
MAX_WAITING = 8192


@dataclass
class Comparisons:
    """Pairs a copied request's own end with its shadow's."""

    max_waiting: int = MAX_WAITING
    # Comparisons that were given up because the request's own end did not come in time.
    given_up: int = 0
    _primaries: OrderedDict[str, ResponseFigures] = field(default_factory=OrderedDict)
    _shadows: OrderedDict[str, tuple[MirrorCopy, ResponseFigures]] = field(default_factory=OrderedDict)

    def primary(self, message: MirrorPrimary) -> ComparisonEvent | None:
        """A request has ended; the comparison, if its shadow has too."""
        figures = ResponseFigures(
            message.status,
            message.ttft_ms,
            message.e2e_ms,
            message.bytes_out,
            message.completion_tokens,
            message.finish_reason,
        )
        shadow = self._shadows.pop(message.id, None)
        if shadow is not None:
            return _event(*shadow, figures)
        self._primaries[message.id] = figures
        if len(self._primaries) > self.max_waiting:
            self._primaries.popitem(last=False)
        return None

    def shadow(self, copy: MirrorCopy, figures: ResponseFigures) -> ComparisonEvent | None:
        """A shadow has answered; the comparison, if the request itself has ended."""
        primary = self._primaries.pop(copy.id, None)
        if primary is not None:
            return _event(copy, figures, primary)
        # Not the prompt: a long stream ends minutes after its shadow.
        bare = MirrorCopy(copy.id, copy.request_id, copy.model, b"", b"", b"", b"")
        self._shadows[copy.id] = bare, figures
        if len(self._shadows) > self.max_waiting:
            self._shadows.popitem(last=False)
            self.given_up += 1
        return None


def _event(copy: MirrorCopy, shadow: ResponseFigures, primary: ResponseFigures) -> ComparisonEvent:
    return ComparisonEvent(copy.id, copy.request_id, copy.model, primary, shadow)
