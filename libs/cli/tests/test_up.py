"""`penstock up` hands every flag to whom it belongs, and finds every fault before anything starts."""

import json
import shlex
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from penstock.cli.data_folder import FolderInUse, data_folder
from penstock.cli.nats_server import NatsServer, new_passwords
from penstock.cli.plan import Plan, make_plan, reachable, start_faults
from penstock.cli.processes import Command
from penstock.cli.ready import NotReady, until_ready
from penstock.cli.up import main, welcome
from penstock.cli.up_settings import DEFAULT_SIM, SERVICES, UpSettings, read_settings
from penstock.common.settings import SettingsError

FREE = ("--port", "0", "--admin-port", "0")


def read(*argv: str, environ: Mapping[str, str] | None = None) -> UpSettings:
    return read_settings(argv, environ or {})


def plan(*argv: str, environ: Mapping[str, str] | None = None) -> Plan:
    return make_plan(read(*FREE, *argv, environ=environ), Path("/data"), environ or {})


def commands(made: Plan) -> dict[str, Command]:
    every = [made.nats_command, *made.sim_commands, *(member.command for member in made.members)]
    return {command.name: command for command in every if command}


def flags(command: Command) -> dict[str, str]:
    """`--workers=2` as {"workers": "2"}."""
    pairs = (word.removeprefix("--").partition("=") for word in command.argv if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def faults(*argv: str, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        read(*argv, environ=environ)
    return "\n".join(caught.value.faults)


def test_without_any_flag_there_are_simulated_engines_and_one_of_each_service() -> None:
    made = plan()
    assert list(commands(made)) == ["nats", "sim", "ingress", "discovery", "scheduler", "mirror"]
    assert len(made.engine_urls) == DEFAULT_SIM
    assert made.base_url.startswith("http://127.0.0.1:")


def test_the_listener_is_on_loopback_and_its_usual_port_unless_told_otherwise() -> None:
    settings = read()
    assert (settings.host, settings.port, settings.admin_port) == ("127.0.0.1", 8080, 8081)


def test_a_flag_goes_to_every_service_that_has_it_and_to_no_other() -> None:
    made = commands(plan("--workers", "3", "--probe-interval", "0.5", "--log-level", "warning"))
    holders = {
        flag: {name for name, command in made.items() if flag in flags(command)}
        for flag in ("workers", "probe-interval", "log-level")
    }
    assert holders == {
        "workers": {"ingress"},
        "probe-interval": {"discovery"},
        "log-level": {"ingress", "discovery", "scheduler", "mirror"},
    }
    assert flags(made["ingress"])["workers"] == "3"


def test_environment_and_file_count_as_flags_do(tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text("workers: 2\naccess-log: false\nsim-model: tiny\nprobe-timeout: 1.5\n")
    environ = {"PENSTOCK_WORKERS": "4", "PENSTOCK_SIM_MAX_BATCH": "7", "HOME": "/home/someone"}
    made = commands(plan("--config", str(file), environ=environ))
    assert flags(made["ingress"]) | {"workers": "4", "access-log": "false"} == flags(made["ingress"])
    assert flags(made["discovery"])["probe-timeout"] == "1.5"
    assert flags(made["sim"]) | {"model": "tiny", "max-batch": "7"} == flags(made["sim"])


def test_children_inherit_the_environment_but_not_settings_that_mean_something_else_to_them() -> None:
    environ = {"PENSTOCK_PORT": "9999", "PENSTOCK_SOMETHING": "x", "PATH": "/bin"}
    for command in commands(plan(environ=environ)).values():
        assert command.environ["PATH"] == "/bin"
        assert not {"PENSTOCK_PORT", "PENSTOCK_SOMETHING"} & command.environ.keys()


def test_secrets_travel_in_the_environment_and_never_in_a_command_line() -> None:
    made = plan("--engine-api-key", "key-of-engines", "--block-hash-secret", "salt-of-hashes")
    assert made.nats is not None
    lines = " ".join(word for command in commands(made).values() for word in command.argv)
    for secret in ("key-of-engines", "salt-of-hashes", *made.nats.passwords.values()):
        assert secret not in lines
    environs = {name: command.environ for name, command in commands(made).items()}
    assert environs["discovery"]["PENSTOCK_ENGINE_API_KEY"] == "key-of-engines"
    assert environs["ingress"]["PENSTOCK_BLOCK_HASH_SECRET"] == "salt-of-hashes"
    assert not any(name.startswith("PENSTOCK_") for name in environs["sim"])


def test_each_service_has_a_bus_user_of_its_own() -> None:
    made = plan("--schedulers", "2")
    assert made.nats is not None
    given = {
        name: urlsplit(command.environ["PENSTOCK_NATS_URL"])
        for name, command in commands(made).items()
        if name not in ("nats", "sim")
    }
    users = {name: address.username for name, address in given.items()}
    assert users == {name: name.removesuffix("-1").removesuffix("-2") for name in given}
    for address in given.values():
        assert address.password == made.nats.passwords[address.username or ""]
        assert (address.hostname, address.port) == ("127.0.0.1", made.nats.port)


def test_each_stack_has_secrets_of_its_own() -> None:
    first, second = plan(), plan()
    assert first.nats is not None
    assert second.nats is not None
    passwords = [*first.nats.passwords.values(), *second.nats.passwords.values()]
    assert len(set(passwords)) == len(passwords)
    assert min(map(len, passwords)) >= 20
    salts = [commands(made)["ingress"].environ["PENSTOCK_BLOCK_HASH_SECRET"] for made in (first, second)]
    assert salts[0] != salts[1]
    assert min(map(len, salts)) >= 32


def test_discovery_is_told_where_the_simulated_engines_will_be() -> None:
    made = plan("--sim", "3", "--sim-max-batch", "5", "--sim-instant")
    told = flags(commands(made)["discovery"])["llm-backend-endpoints"].split(",")
    assert [f"http://{endpoint}" for endpoint in told] == list(made.engine_urls)
    sim = flags(commands(made)["sim"])
    assert (sim["count"], sim["max-batch"], sim["instant"]) == ("3", "5", "true")
    assert made.engine_urls[0].endswith(f":{sim['port']}")


def test_engines_that_prefill_and_decode_are_listed_with_all_that_their_protocol_needs() -> None:
    made = plan("--sim-prefill", "2", "--sim-decode", "1", "--pd-disagg-protocol", "vllm-kvt")
    every = commands(made)
    assert "sim" not in every
    prefill, decode = flags(every["sim-prefill"]), flags(every["sim-decode"])
    assert (prefill["role"], prefill["count"], prefill["kv-connector"]) == ("prefill", "2", "kvt")
    assert (decode["role"], decode["count"], decode["kv-connector"]) == ("decode", "1", "kvt")
    assert flags(every["discovery"])["llm-backend-endpoints"] == "@/data/engines"
    assert made.listing is not None
    listed = [json.loads(line)["instances"][0] for line in made.listing.text.splitlines()]
    assert [one["role"] for one in listed] == ["prefill", "prefill", "decode"]
    assert listed[1]["kv_address"] == f"127.0.0.1:{int(prefill['kv-port']) + 1}"
    assert len(made.engine_urls) == 3


def test_simulated_engines_publish_their_kv_cache_events_where_they_are_asked_for() -> None:
    made = plan("--sim", "2", "--kv-events", "clears")
    sim = flags(commands(made)["sim"])
    events, replay = int(sim["kv-events-port"]), int(sim["kv-events-replay-port"])
    assert made.listing is not None
    listed = [json.loads(line)["instances"][0] for line in made.listing.text.splitlines()]
    assert [one["id"] for one in listed] == [url.removeprefix("http://") for url in made.engine_urls]
    assert [one["labels"] for one in listed] == [
        {"penstock/kv-events": str(events + place), "penstock/kv-events-replay": str(replay + place)}
        for place in range(2)
    ]
    assert flags(commands(made)["discovery"])["llm-backend-endpoints"] == "@/data/engines"
    for silent in (
        plan(),
        plan("--kv-events", "off"),
        plan("--kv-events", "clears", "--sim-kv-events-port", "1"),
    ):
        assert silent.listing is None


def test_simulated_pairs_speak_what_a_current_vllm_ships_unless_told_otherwise() -> None:
    made = commands(plan("--sim-prefill", "1", "--sim-decode", "1", "--sim", "1"))
    assert flags(made["ingress"])["pd-disagg-protocol"] == "vllm-nixl"
    assert flags(made["sim-decode"])["kv-connector"] == "nixl"
    assert flags(made["sim"])["count"] == "1"
    assert "kv-connector" not in flags(made["sim"])


@pytest.mark.parametrize(
    ("argv", "sources", "simulated"),
    [
        ((), "endpoints,nats", DEFAULT_SIM),
        (("--sim", "3"), "endpoints,nats", 3),
        (("--sim", "0"), "nats", 0),
        (("--llm-backend-discovery", "nats"), "nats", 0),
        (("--llm-backend-discovery", "redis,endpoints"), "redis,endpoints", DEFAULT_SIM),
        (("--llm-backend-endpoints", "10.0.0.1:8000"), "endpoints", 0),
    ],
)
def test_engines_may_register_unless_other_sources_are_named(
    argv: tuple[str, ...], sources: str, simulated: int
) -> None:
    made = plan(*argv)
    told = flags(commands(made)["discovery"])
    assert (told["llm-backend-discovery"], len(made.engine_urls)) == (sources, simulated)
    assert ("llm-backend-endpoints" in told) == ("endpoints" in sources)
    assert bool(made.register_url) == ("nats" in sources)
    assert ("penstock register" in welcome(made, "", 1.0)) == ("nats" in sources)


def test_real_engines_mean_no_simulated_ones() -> None:
    made = plan("--llm-backend-endpoints", "10.0.0.1:8000,10.0.0.2:8000")
    assert "sim" not in commands(made)
    assert made.engine_urls == ()
    discovery = flags(commands(made)["discovery"])
    assert discovery["llm-backend-endpoints"] == "10.0.0.1:8000,10.0.0.2:8000"


def test_schedulers_are_replicas_with_ports_of_their_own() -> None:
    made = plan("--schedulers", "3")
    names = [name for name in commands(made) if name.startswith("scheduler")]
    assert names == ["scheduler-1", "scheduler-2", "scheduler-3"]
    assert len({member.admin_url for member in made.members}) == len(made.members) == 6


def test_a_name_given_to_several_schedulers_is_numbered() -> None:
    made = commands(plan("--schedulers", "2", "--scheduler-id", "blue"))
    ids = [flags(made[name])["scheduler-id"] for name in ("scheduler-1", "scheduler-2")]
    assert ids == ["blue-1", "blue-2"]
    assert flags(commands(plan("--scheduler-id", "blue"))["scheduler"])["scheduler-id"] == "blue"


def test_a_bus_of_ones_own_is_used_instead_of_a_started_one() -> None:
    made = plan("--nats-url", "nats://bus.example:4222", "--nats-user", "u", "--nats-password", "p")
    assert made.nats is None
    assert made.nats_url == made.auditor_url == made.register_url == "nats://bus.example:4222"
    assert "nats" not in commands(made)
    environ = commands(made)["scheduler"].environ
    assert environ["PENSTOCK_NATS_URL"] == "nats://bus.example:4222"
    assert environ["PENSTOCK_NATS_PASSWORD"] == "p"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ("--wrokers", "2", "--workers", "0", "--probe-fall", "x", "--sim", "-1", "--sim-kv-blocks", "0"),
            ("--wrokers: unknown flag", "--workers:", "--probe-fall:", "--sim:", "--sim-kv-blocks:"),
        ),
        (("--sim-port", "1"), ("--sim-port: unknown flag",)),
        (("--sim", "1", "--llm-backend-endpoints", "h:1"), ("--sim and", "exclude each other")),
        (("--sim-model", "m", "--llm-backend-endpoints", "h:1"), ("--sim-model and", "exclude each other")),
        (("--llm-backend-endpoints", "h:port"), ("--llm-backend-endpoints",)),
        (("--sim-prefill", "1"), ("--sim-prefill and --sim-decode go together",)),
        (("--pd-disagg-protocol", "nixl"), ("--pd-disagg-protocol", "vllm-nixl")),
        (
            ("--sim-max-batch", "64", "--sim-step-token-budget", "8"),
            ("--sim-step-token-budget is at least --sim-max-batch",),
        ),
        (("--port", "9000", "--admin-port", "9000"), ("--port and --admin-port are both 9000",)),
        (("--nats-user", "u"), ("--nats-user needs --nats-url",)),
        (("--nats-url", "nats://h", "--nats-port", "4222"), ("exclude each other",)),
        (("--nats-url", "nats://h", "--nats-tls-cert", "c"), ("--nats-tls-cert and --nats-tls-key go",)),
    ],
)  # fmt: skip
def test_every_fault_is_listed_before_anything_starts(argv: tuple[str, ...], parts: tuple[str, ...]) -> None:
    text = faults(*argv)
    for part in parts:
        assert part in text


def test_a_fault_in_the_environment_names_its_variable() -> None:
    text = faults(environ={"PENSTOCK_PROBE_FALL": "0", "PENSTOCK_SIM_KV_BLOCKS": "-1"})
    assert "PENSTOCK_PROBE_FALL" in text
    assert "PENSTOCK_SIM_KV_BLOCKS" in text


def test_the_settings_of_all_services_fit_into_one_record() -> None:
    """A field or a rule of one service must not replace another's of the same name."""
    fields: dict[str, object] = {}
    rules: dict[str, str] = {}
    for cls in SERVICES.values():
        for name, field in cls.model_fields.items():
            known = fields.setdefault(name, field.annotation)
            assert field.annotation == known, f"{name} of {cls.__name__} is of another type elsewhere"
        decorators = cls.__pydantic_decorators__
        for name in (*decorators.model_validators, *decorators.field_validators):
            rule = getattr(cls, name).__qualname__
            assert rules.setdefault(name, rule) == rule, f"{rule} and {rules[name]} hide one another"


def test_a_taken_port_is_explained_and_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            main(["--port", str(port), "--admin-port", "0"])
    assert caught.value.code == 2
    assert f"--port {port}: in use by" in (text := capsys.readouterr().err)
    assert "choose another with --port" in text


def test_all_taken_ports_are_told_at_once() -> None:
    with socket.socket() as one, socket.socket() as two:
        for listener in (one, two):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        ports = [str(listener.getsockname()[1]) for listener in (one, two)]
        found = start_faults(read("--port", "0", "--admin-port", ports[0], "--nats-port", ports[1]))
    assert [fault.split(":")[0] for fault in found] == [f"--admin-port {ports[0]}", f"--nats-port {ports[1]}"]


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("fe80::1", "[fe80::1]"),
        ("gw", "gw"),
    ],
)
def test_an_address_is_shown_as_it_is_reached(host: str, shown: str) -> None:
    assert reachable(host) == shown


def test_the_nats_configuration_is_for_its_owner_only(tmp_path: Path) -> None:
    server = NatsServer(4222, tmp_path, new_passwords())
    server.config_file.write_text("left by another run")
    server.config_file.chmod(0o644)
    server.write_config()
    assert stat.S_IMODE(server.config_file.stat().st_mode) == 0o600
    config = json.loads(server.config_file.read_text())
    assert config["listen"] == "127.0.0.1:4222"
    users = [user for account in config["accounts"].values() for user in account["users"]]
    assert {user["user"]: user["password"] for user in users} == server.passwords
    for password in server.passwords.values():
        assert password not in repr(server)


def test_a_temporary_folder_is_removed() -> None:
    with data_folder(None) as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()


def test_a_chosen_folder_stays_and_serves_one_stack_at_a_time(tmp_path: Path) -> None:
    chosen = tmp_path / "a" / "b"
    with data_folder(chosen) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(FolderInUse, match="in use"), data_folder(chosen):
            pass
    with data_folder(chosen) as folder:
        assert (folder / "file").read_text() == "x"


def test_a_folder_that_cannot_be_made_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderInUse, match="--data-dir"), data_folder(tmp_path / "file" / "folder"):
        pass


async def test_waiting_tells_of_each_part_as_it_becomes_ready() -> None:
    asked: dict[str, int] = {"a": 0, "b": 0}

    async def check(name: str, after: int) -> str:
        asked[name] += 1
        return "" if asked[name] > after else "starting"

    ready: list[str] = []
    checks = {"a": lambda: check("a", 1), "b": lambda: check("b", 0)}
    await until_ready(checks, ready.append, lambda: None, 60)
    assert ready == ["b", "a"]
    assert asked == {"a": 2, "b": 1}


async def test_when_time_is_up_the_missing_parts_are_named() -> None:
    async def never() -> str:
        return "no connection to the bus"

    with pytest.raises(NotReady) as caught:
        await until_ready({"scheduler": never}, lambda _: None, lambda: None, 0.01)
    assert caught.value.missing == {"scheduler": "no connection to the bus"}
    assert "scheduler: no connection to the bus" in str(caught.value)


async def test_waiting_ends_when_it_has_become_pointless() -> None:
    async def never() -> str:
        return "dead"

    def give_up() -> None:
        raise RuntimeError("it died")

    with pytest.raises(RuntimeError, match="it died"):
        await until_ready({"scheduler": never}, lambda _: None, give_up, 60)


def test_it_says_what_the_ingress_runs_as_and_how_to_have_it_compiled() -> None:
    assert "runs as machine code\n" in welcome(plan(), "m", 3.0)
    text = welcome(plan(), "m", 3.0, "it has not been compiled")
    assert "runs as Python: it has not been compiled (`make compile`)\n" in text


def test_the_printed_curl_line_is_a_command_for_a_shell() -> None:
    text = welcome(plan(), 'model\'s "name"', 3.0)
    line = next(line for line in text.splitlines() if " curl http" in line)
    words = shlex.split(line)[1:]
    assert words[0] == "curl"
    assert json.loads(words[words.index("-d") + 1])["model"] == 'model\'s "name"'


def test_the_addresses_for_joining_and_for_auditing_are_printed_with_their_credentials() -> None:
    made = plan()
    assert made.nats is not None
    text = welcome(made, "m", 3.0)
    assert f"penstock tap --nats-url {made.nats.url('auditor')}\n" in text
    assert f" {made.nats.url('join')} " in text
    for user in ("ingress", "scheduler", "discovery", "mirror"):
        assert made.nats.passwords[user] not in text
