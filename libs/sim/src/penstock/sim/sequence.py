"""What an engine keeps of one request."""

from math import inf

from penstock.sim.spec import EngineRequest


class TokenSequence:
    """Progress of one request. `shared` of its `blocks` are published, and these are its leading ones."""

    __slots__ = (
        *(
            "arrived_s",
            "blocks",
            "cached_tokens",
            "computed",
            "first_token_s",
            "generated",
            "imported",
            "known",
        ),
        *("last_token_s", "request", "scheduled_s", "shared"),
    )

    def __init__(self, request: EngineRequest, now: float) -> None:
        self.request = request
        # Tokens whose keys and values must be computed before the next one comes out, and those that are.
        self.known = request.prompt_tokens
        self.computed = 0
        # The last token of a prompt is always computed: the first one of the output comes out of it.
        self.imported = min(request.imported_tokens, request.prompt_tokens - 1)
        self.generated = 0
        self.blocks = 0
        self.shared = 0
        self.cached_tokens = 0
        self.arrived_s = now
        # Below every arrival until the request is first scheduled.
        self.scheduled_s = -inf
        self.first_token_s = now
        self.last_token_s = now
