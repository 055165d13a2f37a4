"""What is copied to a shadow, and how: the mirror's configuration, as a person writes it.

The first six fields are those that gateways of this kind have in common; their names are taken in any case.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from penstock.common.errors import PenstockError
from penstock.common.live_config import Document

# The one document of live configuration of kind `mirror`.
NAME = ""
# Names a copy; a request that carries it is not copied again.
MARK = b"x-penstock-mirror"
MAX_NAMES = 256
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_PRINTABLE = re.compile(r"[\x20-\x7e\x80-\xff]*")
_SHOWN = 100

Text = Annotated[str, Field(max_length=512)]


class BadMirrorConfig(PenstockError):
    """Not a configuration; `faults` name the fields."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


class MirrorConfig(BaseModel):
    """Absent fields are false, 0 or empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    Enable: bool = False
    Target: Annotated[str, Field(max_length=2048)] = ""
    Ratio: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    Timeout: Annotated[float, Field(ge=0, le=86_400_000, allow_inf_nan=False)] = 0.0
    Authorization: Annotated[str, Field(max_length=8192, repr=False)] = ""
    EnableLog: bool = False

    Models: Annotated[list[Text], Field(max_length=MAX_NAMES)] = []
    Headers: Annotated[dict[str, Text], Field(max_length=MAX_NAMES)] = {}
    RewriteModel: Text = ""
    Compare: bool = False

    @property
    def active(self) -> bool:
        """Whether any request is copied."""
        return self.Enable and bool(self.Target) and self.Ratio > 0

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        named: dict[Any, Any] = {}
        for given, value in values.items():
            name = _FIELDS.get(str(given).lower(), given)
            if name in named:
                raise ValueError(f"{name}: given twice")
            named[name] = value
        return named

    @field_validator("Target")
    @classmethod
    def _target(cls, target: str) -> str:
        try:
            url = urlsplit(target)
            known = not target or (url.scheme in ("http", "https") and url.hostname and (url.port or 1) > 0)
        except ValueError:
            known = False
        if not known or not target.isascii() or not target.isprintable() or " " in target:
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT, a path may follow")
        if "@" in url.netloc:
            raise ValueError("must not hold a user; give Authorization")
        if url.query or url.fragment or target.endswith(("?", "#")):
            raise ValueError("must end with its path: no ? and no #")
        return target.rstrip("/")

    @field_validator("Authorization")
    @classmethod
    def _authorization(cls, value: str) -> str:
        if not _PRINTABLE.fullmatch(value):
            raise ValueError("must be what a header can hold")
        return value

    @field_validator("Headers")
    @classmethod
    def _headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name in headers:
            if not _TOKEN.fullmatch(name):
                raise ValueError(f"{name[:_SHOWN]!r} is not the name of a header")
        return {name.lower(): value for name, value in headers.items()}


_FIELDS = {name.lower(): name for name in MirrorConfig.model_fields}


def parse_mirror(value: Any) -> MirrorConfig:
    """A configuration from plain JSON types. Raises BadMirrorConfig with everything that is wrong."""
    if not isinstance(value, dict):
        raise BadMirrorConfig([f"must be a JSON object, is {_kind(value)}"])
    try:
        return MirrorConfig.model_validate(value)
    except ValidationError as exc:
        raise BadMirrorConfig([_explain(error) for error in exc.errors()]) from None


def of_document(document: Document | None) -> MirrorConfig:
    """What a document of live configuration says; none: nothing is copied. Raises BadMirrorConfig."""
    return MirrorConfig() if document is None else parse_mirror(document.value)


def _explain(error: Any) -> str:
    where = ".".join(str(part)[:_SHOWN] for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown field; there are {', '.join(MirrorConfig.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not where or where.startswith("Authorization"):
        return f"{where}: {message}".removeprefix(": ")
    return f"{where}: {message}, got {str(error['input'])[:_SHOWN]!r}"


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
