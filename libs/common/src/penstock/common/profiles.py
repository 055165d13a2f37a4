"""Config profiles of models: how an operator writes them, and which of several writings counts.

A document holds the profiles of one model, or of ANY_MODEL. It stands in a file, in the live configuration
(kind `profile`), or comes with the instances (`penstock.common.aibrix_config`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from penstock.common.followed_file import MAX_FILE_BYTES

ANY_MODEL = "*"
# What `config-profile` may always name: the model's default, and the choice by the request's size.
DEFAULT, AUTO = "default", "auto"
# The strategy by which requests ask for disaggregation; which instances are taken is left to the next policy.
DISAGGREGATED = "pd"
BATCHED, STAGED, OFF = "batched", "staged", "off"
MAX_PROFILES, MAX_BUCKETS, MAX_MODELS = 64, 32, 4096
MAX_TOKENS = 2**40
_SHOWN_FAULTS, _QUOTED = 8, 80

ProfileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Strategy = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class ProfileError(ValueError):
    """Profiles that cannot be used; the message names field, value and what is allowed."""


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptBucket(_Written):
    """Prompt lengths, in tokens and both included, that the instances with these labels take."""

    labels: dict[Label, str] = Field(
        default_factory=dict, description="all of them, by name and value; empty: every instance"
    )
    min_tokens: Tokens = Field(0, description="shortest prompt")
    max_tokens: Tokens = Field(MAX_TOKENS, description="longest prompt")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class AutoHints(_Written):
    """When `config-profile: auto` takes a profile: every hint that is given has to hold."""

    prompt_tokens_gte: Tokens | None = Field(None, description="prompts of at least so many tokens")
    prompt_tokens_lt: Tokens | None = Field(None, description="prompts of fewer tokens")
    max_tokens_gte: Tokens | None = Field(None, description="requests that ask for at least so many")
    max_tokens_lt: Tokens | None = Field(None, description="requests that ask for fewer")

    def given(self) -> int:
        """How many hints there are."""
        return sum(hint is not None for hint in self.__dict__.values())

    def hold(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether there are hints and all hold; one about a number that is not known (0) does not."""
        bounds = (
            (prompt_tokens, self.prompt_tokens_gte, self.prompt_tokens_lt),
            (max_tokens, self.max_tokens_gte, self.max_tokens_lt),
        )
        for number, least, below in bounds:
            if least is None and below is None:
                continue
            if not number or number < (least or 0) or (below is not None and number >= below):
                return False
        return self.given() > 0

    def rank(self, name: str) -> tuple[float | str, ...]:
        """Of several that hold the smallest is taken: most hints, then the narrowest, then by name."""
        return (
            -self.given(),
            -(self.prompt_tokens_gte or 0),
            math.inf if self.prompt_tokens_lt is None else self.prompt_tokens_lt,
            -(self.max_tokens_gte or 0),
            math.inf if self.max_tokens_lt is None else self.max_tokens_lt,
            name,
        )


class Disaggregation(_Written):
    """How requests are divided between prefill and decode instances. Any of the first two has them divided,
    unless it is OFF."""

    protocol: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")] | None = Field(
        None, description="see --pd-disagg-protocol; left out: what that says, else the instances' records"
    )
    mode: Literal["batched", "staged", "off"] | None = Field(
        None,
        description="both placed together, or decode when prefill is done; off: only requests whose "
        "routing-strategy is pd are divided",
    )
    skip_below_tokens: int | None = Field(
        None, ge=0, le=1_000_000_000, description="see --pd-skip-below-tokens"
    )
    prefill_imbalance: int | None = Field(None, ge=0, le=100_000, description="see --pd-prefill-imbalance")
    decode_imbalance: int | None = Field(None, ge=0, le=100_000, description="see --pd-decode-imbalance")
    neutral: bool = Field(
        False,
        description="a neutral instance takes all of a request that it would answer sooner than a pair, with "
        "no more in flight than on the instances that decode",
    )

    @property
    def divides(self) -> bool:
        """Whether requests are divided for this alone."""
        return self.mode != OFF and (self.protocol is not None or self.mode is not None)


class ConfigProfile(_Written):
    """One profile. What it leaves out is as the flags of the same name say."""

    routing_strategy: Strategy | None = Field(
        None, description="policy, or a weighted list such as prefix-cache:6,least-request:1"
    )
    locked: bool = Field(False, description="the request header routing-strategy does not count")
    max_requests_per_instance: int | None = Field(
        None, ge=0, le=1_000_000, description="requests that an instance may have in flight; 0: no limit"
    )
    max_kv_ratio_per_instance: float | None = Field(
        None,
        ge=0,
        le=100,
        description="tokens that an instance may have in flight, as a share of its KV cache; 0: no limit",
    )
    imbalance_requests: float | None = Field(None, gt=0, le=100_000, description="see --imbalance-requests")
    imbalance_ratio: float | None = Field(None, ge=0, le=100, description="see --imbalance-ratio")
    prefix_weight: float | None = Field(
        None, ge=0, le=1, description="prefix-cache: weight of the prefix match, the rest is headroom's; 2/3"
    )
    wait_weight: float | None = Field(
        None, ge=0, le=100, description="cache-aware: weight of waiting against that of computing; 1"
    )
    requests_per_second: int | None = Field(
        None, ge=0, le=1_000_000, description="requests per second of the model in this profile; 0: no limit"
    )
    prompt_buckets: Annotated[tuple[PromptBucket, ...], Field(max_length=MAX_BUCKETS)] | None = Field(
        None,
        description="prompt lengths by instance: the first whose labels an instance has counts, one without "
        "any takes all; left out: what the instances say themselves",
    )
    disaggregation: Disaggregation | None = Field(
        None, description="how requests are divided between prefill and decode instances"
    )
    auto: AutoHints | None = Field(None, description="when config-profile: auto takes this profile")


class ModelProfiles(_Written):
    """The profiles of one model."""

    default: ProfileName | None = Field(
        None, description="profile of requests that name none; left out: the one called default, if any"
    )
    locked_routing_strategy: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        None,
        description="policy of every request for the model, whatever profile and header say; empty: none",
    )
    profiles: Annotated[dict[ProfileName, ConfigProfile], Field(max_length=MAX_PROFILES)] = Field(
        default_factory=dict, description="by name"
    )

    @field_validator("profiles")
    @classmethod
    def _no_auto(cls, profiles: dict[str, ConfigProfile]) -> dict[str, ConfigProfile]:
        if any(name.lower() == AUTO for name in profiles):
            raise ValueError("auto is what clients ask for a choice by: give the profile another name")
        return profiles

    def named(self, name: str) -> str:
        """The name behind a `config-profile` other than auto: empty and DEFAULT mean the model's default."""
        if not name or (name == DEFAULT and name not in self.profiles):
            return self.default or DEFAULT
        return name

    def chosen(self, asked: str, prompt_tokens: int, max_tokens: int) -> str:
        """The name of the profile for a request with this `config-profile`."""
        return self.named(self.auto(prompt_tokens, max_tokens) if asked.lower() == AUTO else asked)

    def strategy(self, name: str, asked: str) -> str:
        """What counts for a request with this `routing-strategy` in the profile of this name; empty: it is
        left to the default."""
        one = self.profiles.get(name)
        own = (one.routing_strategy if one is not None else None) or ""
        asked = "" if one is not None and one.locked else asked
        return self.locked_routing_strategy or asked or own

    def policy(self, name: str, asked: str) -> str:
        """The same as a policy: DISAGGREGATED is none, and leaves it to what would count after it."""
        one = self.profiles.get(name)
        locked = bool(self.locked_routing_strategy) or (one is not None and one.locked)
        own = one.routing_strategy if one is not None else None
        texts = self.locked_routing_strategy, "" if locked else asked, own
        return next((text for text in texts if text and text != DISAGGREGATED), "")

    def auto(self, prompt_tokens: int, max_tokens: int) -> str:
        """The profile that fits a request's size best; empty if none says that it does."""
        fitting = [
            (profile.auto.rank(name), name)
            for name, profile in self.profiles.items()
            if profile.auto is not None and profile.auto.hold(prompt_tokens, max_tokens)
        ]
        return min(fitting)[1] if fitting else ""


def merged(layers: Sequence[ModelProfiles]) -> ModelProfiles:
    """Several documents for one model as one, the first counting most: each profile whole from the first that
    has it, `default` and `locked_routing_strategy` each from the first that says something of it."""
    profiles: dict[str, ConfigProfile] = {}
    for layer in reversed(layers):
        profiles |= layer.profiles
    default = next((one.default for one in layers if one.default is not None), None)
    locks = (one.locked_routing_strategy for one in layers)
    lock = next((one for one in locks if one is not None), None)
    # What was checked in parts needs no check as a whole, whose bounds are those of one document.
    return ModelProfiles.model_construct(default=default, locked_routing_strategy=lock, profiles=profiles)


def read_document(value: Any) -> ModelProfiles:
    """The profiles of one model, from plain JSON types. Raises ProfileError."""
    try:
        return ModelProfiles.model_validate(value)
    except ValidationError as exc:
        raise ProfileError("; ".join(faults_of(exc))) from None


def read_file(data: bytes) -> Mapping[str, ModelProfiles]:
    """By model, from YAML (or JSON): a mapping of model, or ANY_MODEL, to its document. Raises ProfileError
    with all faults, one line each."""
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"it is over {MAX_FILE_BYTES} bytes")
    try:
        content = yaml.safe_load(data.decode())
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as exc:
        raise ProfileError(f"it is no YAML: {' '.join(str(exc).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ProfileError(f"it must hold a mapping of models, holds a {type(content).__name__}")
    if len(content) > MAX_MODELS:
        raise ProfileError(f"it names {len(content)} models, over {MAX_MODELS}")
    models, faults = {}, []
    for model, value in content.items():
        if not isinstance(model, str) or not 0 < len(model) <= 512:
            faults.append(f"{str(model)[:_QUOTED]!r}: a model's name is text of 1 to 512 characters")
            continue
        try:
            models[model] = ModelProfiles.model_validate(value)
        except ValidationError as exc:
            faults += (f"{model}: {fault}" for fault in faults_of(exc))
    if faults:
        raise ProfileError("\n".join(faults[:_SHOWN_FAULTS]))
    return models


def faults_of(error: ValidationError) -> list[str]:
    """Each fault with its field and its value, in a line."""
    faults = []
    for fault in error.errors()[:_SHOWN_FAULTS]:
        where = ".".join(map(str, fault["loc"])) or "document"
        text = str(fault["msg"]).removeprefix("Value error, ")
        faults.append(f"{where}: {text}, got {repr(fault['input'])[:_QUOTED]}")
    return faults
