"""Requests per second of models, as their config profiles say."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.common.profiles import ANY_MODEL, ModelProfiles
from penstock.ingress.limits import REQUESTS, SECOND_S, Part


class Rates:
    """The limits of all models and profiles. Each profile of a model has a count of its own."""

    def __init__(self) -> None:
        self._models: Mapping[str, ModelProfiles] = {}
        self.active = False

    def configure(self, models: Mapping[str, ModelProfiles]) -> None:
        """From here on the config profiles are these, by model or ANY_MODEL."""
        self._models = models
        self.active = any(
            one.requests_per_second for model in models.values() for one in model.profiles.values()
        )

    def part(self, model: str, asked: str, prompt_tokens: int, max_tokens: int) -> Part | None:
        """What a request adds to that asks for the profile `asked`; None: it is not limited."""
        config = self._models.get(model) or self._models.get(ANY_MODEL)
        if config is None:
            return None
        name = config.chosen(asked, prompt_tokens, max_tokens)
        one = config.profiles.get(name)
        if one is None or not one.requests_per_second:
            return None
        # Keys of users begin with a digit.
        key = f"m{len(model)}:{model}:{name}|s"
        return Part(key, SECOND_S, 1, one.requests_per_second, REQUESTS, f"model in profile '{name}'")
