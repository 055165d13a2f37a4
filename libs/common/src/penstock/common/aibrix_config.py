"""AIBrix's pod annotation `model.aibrix.ai/config`, understood as it is.

Fields and their meaning: AIBrix, docs "Model Config Profiles" and pkg/plugins/gateway/configprofiles.
Keys that are not known are passed over, as are those of disaggregation.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penstock.common.profiles import (
    AUTO,
    MAX_TOKENS,
    AutoHints,
    ConfigProfile,
    ModelProfiles,
    ProfileError,
    faults_of,
)

_HINTS = "promptTokensGte", "promptTokensLt", "maxTokensGte", "maxTokensLt"


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _RoutingConfig(_Read):
    promptLenBucketMinLength: int = 0  # noqa: N815  # AIBrix's names
    promptLenBucketMaxLength: int = 0  # noqa: N815
    promptTokensGte: int | None = Field(None, ge=0, le=MAX_TOKENS)  # noqa: N815
    promptTokensLt: int | None = Field(None, ge=0, le=MAX_TOKENS)  # noqa: N815
    maxTokensGte: int | None = Field(None, ge=0, le=MAX_TOKENS)  # noqa: N815
    maxTokensLt: int | None = Field(None, ge=0, le=MAX_TOKENS)  # noqa: N815


class _Profile(_Read):
    routingStrategy: str = Field("", max_length=512)  # noqa: N815
    requestsPerSecond: int | None = Field(None, le=1_000_000)  # noqa: N815
    routingConfig: _RoutingConfig | None = None  # noqa: N815


class _Annotation(_Read):
    lockedRoutingStrategy: str = Field("", max_length=512)  # noqa: N815
    defaultProfile: str = ""  # noqa: N815
    profiles: dict[str, _Profile] = Field(min_length=1)


@dataclass(frozen=True)
class InstanceProfiles:
    """What one instance says: `profiles` for its model, and the prompt lengths that itself takes in each
    profile (least and most tokens, both included), where it says so. `text` is equal for equal profiles."""

    profiles: ModelProfiles
    lengths: dict[str, tuple[int, int]]
    text: str

    def takes(self, name: str) -> tuple[int, int] | None:
        """The lengths taken in the profile `name`, else in its default one; None for any."""
        known = name if name in self.profiles.profiles else self.profiles.named("")
        return self.lengths.get(known)


def read_annotation(text: str) -> InstanceProfiles:
    """Parse it; an annotation without profiles counts for nothing, not even its lock, as in AIBrix.

    Raises:
        ProfileError: it cannot be used; nothing else is raised, whatever the text.
    """
    try:
        read = _Annotation.model_validate_json(text)
        # A profile of that name cannot be chosen: the header asks for a choice by it.
        known = {name: one for name, one in read.profiles.items() if name.lower() != AUTO}
        profiles = ModelProfiles(
            default=read.defaultProfile.strip() or None,
            locked_routing_strategy=read.lockedRoutingStrategy.strip() or None,
            profiles={name: _profile(one) for name, one in known.items()},
        )
    except ValidationError as exc:
        raise ProfileError("; ".join(faults_of(exc))) from None
    all_lengths = {name: _lengths(one.routingConfig) for name, one in known.items() if one.routingConfig}
    lengths = {name: pair for name, pair in all_lengths.items() if pair != (0, MAX_TOKENS)}
    return InstanceProfiles(profiles, lengths, profiles.model_dump_json())


def _profile(read: _Profile) -> ConfigProfile:
    hints = {name: getattr(read.routingConfig, name) for name in _HINTS} if read.routingConfig else {}
    auto = AutoHints(
        prompt_tokens_gte=hints.get("promptTokensGte"),
        prompt_tokens_lt=hints.get("promptTokensLt"),
        max_tokens_gte=hints.get("maxTokensGte"),
        max_tokens_lt=hints.get("maxTokensLt"),
    )
    return ConfigProfile(
        routing_strategy=read.routingStrategy.strip() or None,
        requests_per_second=max(read.requestsPerSecond or 0, 0) or None,
        auto=auto if auto.given() else None,
    )


def _lengths(config: _RoutingConfig) -> tuple[int, int]:
    """A most of 0 is none, a negative least 0; a least above the most fits nothing."""
    return max(config.promptLenBucketMinLength, 0), config.promptLenBucketMaxLength or MAX_TOKENS
