"""By which method a request is divided: its config profile says, else the settings, else the records."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.common.instances import InstanceTable
from penstock.common.messages import ScheduleRequest
from penstock.common.model import Role
from penstock.common.profiles import (
    ANY_MODEL,
    BATCHED,
    DISAGGREGATED,
    OFF,
    STAGED,
    Disaggregation,
    ModelProfiles,
)
from penstock.ingress.disaggregation.protocols import Method, find, method_of, spoken_by
from penstock.ingress.failures import GatewayError

MAX_KNOWN = 8192


class Methods:
    """`divides`: whether requests may be divided that do not ask for it."""

    def __init__(self, protocol: str, *, staged: bool, table: InstanceTable) -> None:
        """`protocol` (empty: none) and `staged` count where no config profile says otherwise."""
        self._protocol, self._staged, self._table = protocol, staged, table
        self._profiles: Mapping[str, ModelProfiles] = {}
        self.divides = bool(protocol)
        # What the records of a model's prefill instances name, under one version of the table.
        self._spoken: dict[str, str] = {}
        self._version = -1

    def configure(self, profiles: Mapping[str, ModelProfiles]) -> None:
        """From here on the config profiles are these, by model or ANY_MODEL."""
        self._profiles = profiles
        self.divides = bool(self._protocol) or any(map(_divides, profiles.values()))

    def of(self, request: ScheduleRequest) -> Method | None:
        """A request's method; None if it is not to be divided. Raises GatewayError where nobody says how."""
        config = self._profiles.get(request.model) or self._profiles.get(ANY_MODEL)
        strategy, said = request.strategy, None
        if config is not None:
            name = config.chosen(request.profile, request.prompt_tokens, request.max_tokens)
            one = config.profiles.get(name)
            strategy, said = config.strategy(name, strategy), one.disaggregation if one is not None else None
        said = said or Disaggregation()
        by_flag = bool(self._protocol) and said.mode != OFF
        if not (strategy == DISAGGREGATED or said.divides or by_flag):
            return None
        protocol = said.protocol or self._protocol or self._by_records(request.model)
        if not protocol:
            text = (
                "disaggregation: neither --pd-disagg-protocol nor a config profile names a protocol, and the "
                f"prefill instances of '{request.model}' do not name one (label kv_connector, or engine "
                "sglang)"
            )
            raise GatewayError("invalid_strategy", text, param="routing-strategy")
        return method_of(protocol, staged=self._is_staged(said))

    def fault(self, profiles: ModelProfiles) -> str:
        """Why a document cannot be used: the first combination that a protocol cannot do; empty if none."""
        return fault_of(profiles, self._protocol, staged=self._staged)

    def _is_staged(self, said: Disaggregation) -> bool:
        return said.mode == STAGED if said.mode in (BATCHED, STAGED) else self._staged

    def _by_records(self, model: str) -> str:
        """The one protocol that all prefill instances of a model name; empty if there is none."""
        if self._version != self._table.version or len(self._spoken) >= MAX_KNOWN:
            self._spoken.clear()
            self._version = self._table.version
        if model not in self._spoken:
            names = {spoken_by(one) for one in self._table.serving(model) if one.role is Role.PREFILL}
            self._spoken[model] = next(iter(names)) if len(names) == 1 else ""
        return self._spoken[model]


def fault_of(profiles: ModelProfiles, protocol: str, *, staged: bool) -> str:
    """As `Methods.fault`, under the flags of that name."""
    for name, one in profiles.profiles.items():
        said = one.disaggregation or Disaggregation()
        wanted = said.mode == STAGED if said.mode is not None else staged
        try:
            if said.mode != OFF and (said.protocol or (protocol and said.mode is not None)):
                find(said.protocol or protocol, staged=wanted)
        except ValueError as exc:
            return f"profiles.{name}.disaggregation: {exc}"
    return ""


def _divides(profiles: ModelProfiles) -> bool:
    """Whether any request may be divided for what a document says."""
    if profiles.locked_routing_strategy == DISAGGREGATED:
        return True
    return any(
        one.routing_strategy == DISAGGREGATED
        or (one.disaggregation is not None and one.disaggregation.divides)
        for one in profiles.profiles.values()
    )
