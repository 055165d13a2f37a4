"""Settings of rate limits, and the record of a user."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

MAX_REQUESTS, MAX_TOKENS = 10**9, 10**12
MAX_MODELS = 256


class Limits(BaseModel):
    """What may be asked per minute; 0: any amount."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpm: int = Field(0, ge=0, le=MAX_REQUESTS, description="requests per minute; 0: no limit")
    tpm: int = Field(0, ge=0, le=MAX_TOKENS, description="tokens per minute; 0: no limit")


class UserRecord(BaseModel):
    """The live configuration's document of kind `user`. What it does not name has the default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rpm: int | None = Field(
        None, ge=0, le=MAX_REQUESTS, description="requests per minute over all models; 0: no limit"
    )
    tpm: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="tokens per minute over all models; 0: no limit"
    )
    models: dict[str, Limits] = Field(
        default_factory=dict, max_length=MAX_MODELS, description="further limits for single models"
    )


class LimitSettings(BaseModel):
    """Flags of the rate limits."""

    limits_default_rpm: int = Field(
        0, ge=0, le=MAX_REQUESTS, description="requests per minute of a user without a record; 0: no limit"
    )
    limits_default_tpm: int = Field(
        0, ge=0, le=MAX_TOKENS, description="tokens per minute of a user without a record; 0: no limit"
    )
    limits_user: Literal["key", "header"] = Field(
        "key",
        description="who asks, with --api-keys: whose limits and turns count, whose prompts are kept apart, "
        "who is in a canary's share: key: its owner; header: whom the header user names, which anybody with "
        "a key can choose",
    )
    limits_store: Literal["memory", "redis", "nats"] = Field(
        "nats",
        description="where requests are counted: nats, redis: all ingresses together, on the bus or in "
        "Redis; memory: each ingress for itself, all of its workers together",
    )
    limits_nats_timeout: float = Field(
        0.25, gt=0, le=10, description="seconds that the bus may take to count, then it counts as away"
    )
    limits_redis_url: str = Field(
        "", max_length=512, description="Redis for --limits-store redis, such as redis://host:6379/0"
    )
    limits_redis_username: str = Field("", max_length=256, description="user at that Redis")
    limits_redis_password: SecretStr = Field(SecretStr(""), description="password at that Redis")
    limits_redis_timeout: float = Field(
        0.25, gt=0, le=10, description="seconds that Redis may take to answer, then it counts as away"
    )
    limits_on_store_loss: Literal["local", "open", "closed"] = Field(
        "local",
        description="while that store is away: local: each worker counts for itself; open: nothing is "
        "limited; closed: requests of limited users get a 503",
    )

    @model_validator(mode="after")
    def _limit_store(self) -> Self:
        wanted = "such as redis://127.0.0.1:6379/0"
        if (self.limits_store == "redis") is not bool(self.limits_redis_url):
            raise ValueError(f"--limits-store redis and --limits-redis-url go together: give both, {wanted}")
        if not self.limits_redis_url:
            return self
        try:
            url = urlsplit(self.limits_redis_url)
            sane = url.scheme in ("redis", "rediss") and url.hostname and (url.port or 1) > 0
        except ValueError:
            raise ValueError(f"--limits-redis-url is not an address; {wanted}") from None
        if "@" in url.netloc:
            raise ValueError(
                "--limits-redis-url holds credentials: give --limits-redis-username and "
                "--limits-redis-password instead"
            )
        database = url.path.removeprefix("/")
        if not sane or url.query or url.fragment or (database and not database.isdecimal()):
            raise ValueError(f"--limits-redis-url is not the address of one server; {wanted}")
        return self
