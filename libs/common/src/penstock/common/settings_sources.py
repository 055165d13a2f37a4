"""Where settings come from: flags, environment and a YAML file, each read into values by field name.

Nothing is checked here but that a source can be read and names fields that there are; faults are added to
a list, so that all of all sources are reported together.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, SecretStr

ENV_PREFIX = "PENSTOCK_"


def flag_of(field: str) -> str:
    """`nats_url` -> `--nats-url`."""
    return "--" + field.replace("_", "-")


def env_of(field: str) -> str:
    """`nats_url` -> `PENSTOCK_NATS_URL`."""
    return ENV_PREFIX + field.upper()


class _Parser(argparse.ArgumentParser):
    """argparse that hands its complaint back instead of leaving at the first one."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def read_flags(
    cls: type[BaseModel], argv: Sequence[str], prog: str, description: str | None, faults: list[str]
) -> dict[str, Any]:
    """Values of the flags that are given; faults name what is unknown or incomplete."""
    parser = _Parser(prog=prog, description=description or cls.__doc__, allow_abbrev=False)
    for name, field in cls.model_fields.items():
        is_bool = field.annotation is bool
        parser.add_argument(
            flag_of(name),
            dest=name,
            default=argparse.SUPPRESS,
            nargs="?" if is_bool else None,
            const="true" if is_bool else None,
            metavar=_kind(field.annotation),
            help=_help(name, field).replace("%", "%%"),
        )
    try:
        known, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as exc:
        faults.append(str(exc))
        return {}
    faults.extend(f"{arg}: unknown flag" for arg in unknown if arg.startswith("-"))
    faults.extend(
        f"{arg}: unexpected argument"
        for arg in unknown
        if not arg.startswith("-") and not _is_value(arg, argv)
    )
    return dict(vars(known))


def _is_value(arg: str, argv: Sequence[str]) -> bool:
    """Whether `arg` only follows an unknown flag, so that the flag alone is reported."""
    position = list(argv).index(arg)
    return position > 0 and argv[position - 1].startswith("-")


def _kind(annotation: Any) -> str:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, options)) + "}"
    if options and isinstance(annotation, types.UnionType):
        return _kind(next(o for o in options if o is not type(None)))
    names = {int: "N", float: "NUMBER", bool: "true|false", Path: "PATH", SecretStr: "SECRET"}
    return names.get(annotation, "TEXT")


def shown(field: Any) -> str:
    """A field's default as flags, variables and files would have it."""
    default = field.default
    text = (
        default.get_secret_value()
        if isinstance(default, SecretStr)
        else ""
        if default is None
        else str(default)
    )
    return text.lower() if isinstance(default, bool) else text


def _help(name: str, field: Any) -> str:
    default = shown(field)
    return f"{field.description} {f'(default {default}) ' if default else ''}[{env_of(name)}]"


def read_environment(cls: type[BaseModel], environ: Mapping[str, str]) -> dict[str, Any]:
    """Values of the variables that are set."""
    return {name: environ[env_of(name)] for name in cls.model_fields if env_of(name) in environ}


def read_file(cls: type[BaseModel], path: Path, faults: list[str]) -> dict[str, Any]:
    """Values of a YAML file; faults name unknown keys, or say why it cannot be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        faults.append(f"--config {path}: cannot be read: {exc}")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict):
        faults.append(f"--config {path}: must hold a mapping of settings, holds a {type(content).__name__}")
        return {}
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for name in sorted(values.keys() - cls.model_fields.keys()):
        faults.append(f"{path}: {name.replace('_', '-')}: unknown key")
        del values[name]
    return values


def explain(cls: type[BaseModel], error: Any, origin: Mapping[str, str]) -> str:
    """A fault that pydantic found, for a person: where the value came from, what is wrong, what it is."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    where = origin.get(name, flag_of(name))
    if cls.model_fields[name].annotation is SecretStr:
        return f"{where}: {message}"
    return f"{where}: {message}, got {error['input']!r}"
