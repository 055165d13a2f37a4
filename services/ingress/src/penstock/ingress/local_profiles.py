"""What a config profile or a strategy header means for placement without a scheduler."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.common.messages import ScheduleRequest
from penstock.common.profiles import ANY_MODEL, ModelProfiles

HASH_BYTES = 8
# Policies that look at load alone: what belongs together is not kept together for them. Those that are not
# named here, an operator's own among them, get the placement of the default.
BY_LOAD = frozenset(
    {
        *("random", "round-robin", "least-request", "power-of-two", "throughput", "load-balance"),
        *("least-kv-cache", "least-latency", "least-busy-time", "decode-balance"),
    }
)


class LocalProfiles:
    """The wishes of requests, as far as an ingress can meet them by itself."""

    def __init__(self, max_requests: int = 0) -> None:
        """`max_requests` on one instance, unless a profile says otherwise; 0: any number."""
        self._max_requests = max_requests
        self._models: Mapping[str, ModelProfiles] = {}
        # Without profiles nothing but the request's own strategy has to be asked for.
        self.active = False

    def configure(self, models: Mapping[str, ModelProfiles]) -> None:
        """From here on the config profiles are these, by model or ANY_MODEL."""
        self._models, self.active = models, bool(models)

    def of(self, request: ScheduleRequest) -> tuple[bytes, int]:
        """(what the request is kept together by, empty for nothing; requests that an instance may have)."""
        strategy, most = request.strategy, self._max_requests
        config = self._models.get(request.model) or self._models.get(ANY_MODEL)
        if config is not None:
            name = config.chosen(request.profile, request.prompt_tokens, request.max_tokens)
            strategy, one = config.policy(name, request.strategy), config.profiles.get(name)
            if one is not None and one.max_requests_per_instance is not None:
                most = one.max_requests_per_instance
        if strategy.lower() in BY_LOAD:
            return b"", most
        return request.session.encode() or request.block_hashes[:HASH_BYTES], most
