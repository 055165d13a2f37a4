"""The operator's own policies, from entry points and files; read once, when the settings are."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from penstock.scheduler.policies.custom import Policy
from penstock.scheduler.policies.table import ALIASES, STRATEGIES

GROUP = "penstock.policies"
_Found = tuple[str, object, object]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class PluginError(ValueError):
    """A policy cannot be had; the message says which and why."""


@cache
def load(paths: tuple[Path, ...]) -> Mapping[str, Policy]:
    """By name: the entry points of GROUP, and `POLICIES` of each module.

    Raises:
        PluginError: with every fault found.
    """
    found: dict[str, Policy] = {}
    faults: list[str] = []
    for origin, name, policy in [*_installed(faults), *_of_files(paths, faults)]:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            faults.append(f"{origin}: {name!r} is no name of a policy: lower-case letters, digits and -")
        elif name in STRATEGIES or name in ALIASES:
            faults.append(f"{origin}: {name} is a policy of Penstock's own: choose another name")
        elif name in found:
            faults.append(f"{origin}: {name} is there twice")
        elif not callable(policy):
            faults.append(f"{origin}: {name} cannot be called: give a function (request, candidates)")
        else:
            found[name] = policy
    if faults:
        raise PluginError("; ".join(faults))
    return found


def _installed(faults: list[str]) -> list[_Found]:
    entries: list[_Found] = []
    for entry in entry_points(group=GROUP):
        try:
            entries.append((f"entry point {entry.value}", entry.name, entry.load()))
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # others' code: whatever it raises is told
            faults.append(f"entry point {entry.name} = {entry.value}: {type(exc).__name__}: {exc}")
    return entries


def _of_files(paths: tuple[Path, ...], faults: list[str]) -> list[_Found]:
    entries: list[_Found] = []
    for path in paths:
        try:
            policies = getattr(_module(path), "POLICIES", None)
        except (Exception, SystemExit) as exc:  # noqa: BLE001  # others' code: whatever it raises is told
            faults.append(f"{path}: {type(exc).__name__}: {exc}")
            continue
        if isinstance(policies, Mapping) and policies:
            entries += [(str(path), name, policy) for name, policy in policies.items()]
        else:
            faults.append(f"{path}: has no POLICIES, a dict of name -> function (request, candidates)")
    return entries


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"penstock_policies_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
