"""ConfiguredCatalog: policies as config profiles have them, by a request's model, profile and strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

from penstock.common.messages import ScheduleRequest
from penstock.common.model import Instance
from penstock.common.profiles import (
    ANY_MODEL,
    AUTO,
    DEFAULT,
    DISAGGREGATED,
    ConfigProfile,
    ModelProfiles,
    PromptBucket,
)
from penstock.scheduler.policies.catalog import MAX_PROFILES, BadProfile, BadStrategy, Catalog, strategy_of
from penstock.scheduler.policies.custom import Policy
from penstock.scheduler.policies.filters import FittingPrompt
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.profile import Division, Profile

T = TypeVar("T")


class OwnLengths(Protocol):
    """What instances say of the prompt lengths that they take."""

    def lengths(self, instance: Instance, profile: str) -> tuple[int, int] | None:
        """Least and most tokens in a profile, None for any."""


class _Silent:
    def lengths(self, instance: Instance, profile: str) -> tuple[int, int] | None:
        return None


class ConfiguredCatalog(Catalog):
    """A catalog whose choice follows `configure`; requests of models without profiles see a plain one."""

    def __init__(self, thresholds: Thresholds, custom: Mapping[str, Policy] | None = None) -> None:
        super().__init__(thresholds, custom)
        self._custom = custom
        self._models: Mapping[str, ModelProfiles] = {}
        self._own: OwnLengths = _Silent()
        self._variants: dict[Thresholds, Catalog] = {thresholds: self}
        # By model, name of the profile, strategy and default as requests have them.
        self._chosen: dict[tuple[str, str, str, str], Profile] = {}

    def configure(self, models: Mapping[str, ModelProfiles], own: OwnLengths) -> None:
        """From here on requests are decided by these; ANY_MODEL stands for models that are not among them."""
        self._models, self._own = models, own
        self._chosen.clear()
        self._variants = {self._thresholds: self}

    def fault(self, profiles: ModelProfiles) -> str:
        """Why a document cannot be used here: the first policy that there is not; empty if there is none."""
        named = {"locked_routing_strategy": profiles.locked_routing_strategy}
        for name, one in profiles.profiles.items():
            named[f"profiles.{name}.routing_strategy"] = one.routing_strategy
        for field, text in named.items():
            try:
                if text and text != DISAGGREGATED:
                    self.find(text)
            except BadStrategy as exc:
                return f"{field}: {exc}"
        return ""

    def choose(self, request: ScheduleRequest, default: str) -> Profile:
        models = self._models
        if not models:
            return super().choose(request, default)
        config = models.get(request.model) or models.get(ANY_MODEL)
        if config is None:
            return super().choose(request, default)
        name = request.profile
        if name and name.lower() == AUTO:
            name = config.auto(request.prompt_tokens, request.max_tokens)
        strategy = strategy_of(request)
        key = request.model, name, strategy, default
        profile = self._chosen.get(key)
        if profile is None:
            profile = self._make_chosen(config, name, strategy, default)
            if len(self._chosen) >= MAX_PROFILES:
                self._chosen.clear()
            self._chosen[key] = profile
        return profile

    def _make_chosen(self, config: ModelProfiles, asked: str, strategy: str, default: str) -> Profile:
        name = config.named(asked)
        one, policy = config.profiles.get(name), config.policy(name, strategy) or default
        if one is None:
            if asked not in ("", DEFAULT):
                raise BadProfile(asked, config.profiles)
            return self.find(policy)
        fitting = FittingPrompt(_Lengths(name, one.prompt_buckets, self._own))
        profile, said = self._variant(one).find(policy), one.disaggregation
        division = None
        if said is not None:
            division = Division(
                said.skip_below_tokens, said.neutral, said.prefill_imbalance, said.decode_imbalance
            )
        return replace(profile, filters=(fitting, *profile.filters), config=name, division=division)

    def _variant(self, one: ConfigProfile) -> Catalog:
        """The policies with a profile's own parameters."""
        base = self._thresholds
        thresholds = Thresholds(
            _or(one.imbalance_requests, base.imbalance_requests),
            _or(one.imbalance_ratio, base.imbalance_ratio),
            _or(one.max_requests_per_instance, base.max_requests),
            _or(one.prefix_weight, base.prefix_weight),
            _or(one.wait_weight, base.wait_weight),
            _or(one.max_kv_ratio_per_instance, base.max_kv_ratio),
        )
        variant = self._variants.get(thresholds)
        if variant is None:
            variant = self._variants[thresholds] = Catalog(thresholds, self._custom)
        return variant


def _or(own: T | None, otherwise: T) -> T:
    return otherwise if own is None else own


class _Lengths:
    """The prompt lengths that instances take in one profile: by its buckets, else by their own word."""

    def __init__(self, profile: str, buckets: tuple[PromptBucket, ...] | None, own: OwnLengths) -> None:
        self._profile, self._buckets, self._own = profile, buckets, own

    def of(self, instance: Instance) -> tuple[int, int] | None:
        if self._buckets is None:
            return self._own.lengths(instance, self._profile)
        for bucket in self._buckets:
            if bucket.labels.items() <= instance.labels.items():
                return bucket.min_tokens, bucket.max_tokens
        return None
