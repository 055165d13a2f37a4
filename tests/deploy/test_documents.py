"""What documents and manifests name exists: links and anchors, flags, variables, metrics, paths, subjects."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from penstock.cli import docs
from penstock.cli.bench.settings import BenchSettings
from penstock.cli.nats_accounts import variable_of
from penstock.cli.up_settings import SERVICES
from penstock.common import subjects
from penstock.common.permissions import AUDITORS_ACCOUNT, GRANTS
from penstock.common.routing_events import TYPES
from penstock.common.settings import Settings, describe

TREE = Path(__file__).resolve().parents[2]
# What is about other programs: their flags, each written somewhere as such.
FOREIGN_FLAGS = {
    "kubectl": {
        "--namespace", "--for", "--timeout", "--all", "--force", "--replicas", "--selector", "--wait",
        "--stdin", "--type", "--patch", "--as", "--dry-run", "--ignore-not-found",
    },
    "docker": {"--build", "--build-arg", "--wait", "--scale", "--entrypoint", "--profile"},
    "git, make, pip, pytest": {"--help", "--check", "--folder", "--no-deps", "--target"},
    "prometheus, the collector": {"--config", "--storage"},
    "vLLM, for what observability needs": {"--otlp-traces-endpoint", "--enable-prompt-tokens-details"},
    "redis-server": {"--save", "--appendonly", "--notify-keyspace-events", "--maxmemory"},
    "etcd": {
        "--data-dir", "--listen-client-urls", "--advertise-client-urls", "--name", "--listen-peer-urls",
        "--initial-advertise-peer-urls", "--initial-cluster", "--initial-cluster-token",
        "--initial-cluster-state", "--listen-metrics-urls", "--auto-compaction-mode",
        "--auto-compaction-retention", "--quota-backend-bytes", "--snapshot-count",
    },
    "nats": {
        "--server", "--raw", "--creds", "--user", "--password", "--ack", "--filter", "--pull",
        "--inbox-prefix", "--deliver", "--defaults",
    },
    "etcdctl, curl": {"--prefix", "--lease", "--enable-grpc-gateway", "--cacert"},
    "deploy/Dockerfile": {"--from", "--gid", "--uid", "--no-create-home", "--shell", "--yes"},
    "engines": {"--kv-events-config", "--kv-transfer-config", "--enable-prompt-tokens-details"},
    "deploy/k8s/scenario.py": {"--url", "--namespace", "--write-in-pod"},
}  # fmt: skip
FOREIGN = set().union(*FOREIGN_FLAGS.values())
# Of the tests, of the image build, and of the NATS server's configuration.
OTHER_VARIABLES = {
    "PENSTOCK_SOAK_SECONDS", "PENSTOCK_FUZZ_SECONDS", "PENSTOCK_SEED", "PENSTOCK_REGISTRY",
    "PENSTOCK_VERSION", "PENSTOCK_NATS_SERVER_NAME", AUDITORS_ACCOUNT,
    *(variable_of(user) for user in GRANTS),
    *(one.name for one in (*subjects.STREAMS, *subjects.COUNTERS)),
}  # fmt: skip
# A Service named penstock injects it.
INJECTED = {"PENSTOCK_PORT"}


def committed(*patterns: str) -> list[Path]:
    """Files in git of these kinds."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=TREE, capture_output=True, check=True,
    )  # fmt: skip
    return sorted({TREE / name.decode() for name in done.stdout.split(b"\0") if name})


DOCUMENTS = committed("*.md")
# Decision records and the changelog tell what was so at their time; the migration page names others' flags.
CURRENT = [
    path
    for path in DOCUMENTS
    if "decisions" not in path.parts and path.name != "CHANGELOG.md" and path.name != "migration.md"
]
DEPLOYED = [
    path for path in committed("deploy/*") if path.suffix in (".yaml", ".sh", ".json", ".conf", ".md", "")
]


def name_of(path: Path) -> str:
    return str(path.relative_to(TREE))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@cache
def anchors(path: Path) -> frozenset[str]:
    """Of each heading, as GitHub makes them."""
    found: dict[str, int] = {}
    made = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_code(path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        made.add(f"{slug}-{count}" if count else slug)
    return frozenset(made)


def links(path: Path) -> Iterator[str]:
    """Targets in the tree."""
    text = re.sub(r"`[^`\n]*`", "", without_code(path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text):
        if not re.match(r"[a-z][a-z+.-]*:", target):
            yield target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{target}: no such file"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("index", ["README.md", "docs/index.md"])
def test_the_list_of_guides_is_whole(index: str) -> None:
    linked = {((TREE / index).parent / target.partition("#")[0]).resolve() for target in links(TREE / index)}
    assert {path for path in DOCUMENTS if path.parent.name == "guide"} <= linked


@cache
def programs() -> tuple[type[Settings], ...]:
    """Every settings record that some program reads."""
    found: set[type[Settings]] = {BenchSettings, docs.DocsSettings}
    waiting: list[type[Settings]] = [Settings]
    # Importing the pages imports every program.
    while waiting:
        cls = waiting.pop()
        found.add(cls)
        waiting += cls.__subclasses__()
    return tuple(cls for cls in found if not inspect.isabstract(cls))


@cache
def flags() -> frozenset[str]:
    """Those of every program, and of the stack with their prefix."""
    own = {flag for cls in programs() for flag, *_ in describe(cls)}
    own |= {f"--no-{flag[2:]}" for flag in own}
    sources = committed("tests/*_bench/*.py", "libs/cli/src/penstock/cli/bench/*.py", "services/*/src/*.py")
    for path in sources:
        own |= set(re.findall(r"add_argument\(\s*\"(--[a-z][a-z0-9-]*)\"", path.read_text()))
    return frozenset(own)


def named_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9]*(?:-[a-z0-9]+)*-?)(?![\w])", text))


def is_known(flag: str) -> bool:
    if flag.endswith("-"):
        return any(known.startswith(flag) for known in flags())
    return flag in flags() or flag in FOREIGN


@pytest.mark.parametrize("path", [*CURRENT, *(p for p in DEPLOYED if p.suffix != ".md")], ids=name_of)
def test_every_flag_and_variable_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    assert {flag for flag in named_flags(text) if not is_known(flag)} == set()
    variables = {variable for cls in programs() for _, variable, *_ in describe(cls)}
    named = set(re.findall(r"\bPENSTOCK_[A-Z0-9_]+[A-Z0-9]\b", text)) - INJECTED - OTHER_VARIABLES
    named = {one for one in named if not any(known.startswith(f"{one}_") for known in variables)}
    assert named <= variables


def test_the_migration_page_names_flags_that_exist_and_the_defaults_they_have() -> None:
    text = (TREE / "docs" / "migration.md").read_text()
    defaults: dict[str, set[str]] = {}
    for cls in programs():
        for flag, _, default, _ in describe(cls):
            defaults.setdefault(flag, set()).add(default)
    same = re.search(r"\| flag \| default \|\n\|---\|---\|\n((?:\|.*\|\n)+)", text)
    assert same
    for line in same[1].splitlines():
        flag, default = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        assert default in defaults[flag], flag
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else [line]
        # The last cell is what it is called here, but for what has no counterpart.
        here = cells[-1]
        assert all(is_known(flag) for flag in named_flags(here)), here


def test_the_migration_page_has_every_value_and_flag_of_the_systems_it_is_about() -> None:
    text = (TREE / "docs" / "migration.md").read_text()
    for value in (
        "gatewayPlugin.replicaCount", "gateway.envoyProxy.replicas", "AIBRIX_STATESYNC_ENABLED",
        "dependencies.redis.host", "metadata.redis", "bufferLimit", "connectionLimit", "maxConnections",
        "maxParallelRequests", "maxParallelRetries", "maxPendingRequests", "maxRequestsPerConnection",
        "http2.maxConcurrentStreams", "route.timeout", "route.connectTimeout", "circuitBreakers.maxRequests",
        "circuitBreakers.maxConnections", "circuitBreakers.maxPendingRequests", "route.idleTimeout",
        "failOpen", "messageTimeout", "AIBRIX_GATEWAY_TIMEOUT_SECONDS", "AIBRIX_GRPC_MAX_MESSAGE_SIZE_BYTES",
        "AIBRIX_PREFIX_CACHE_BLOCK_SIZE", "AIBRIX_PREFIX_CACHE_TOKENIZER_TYPE", "ROUTING_ALGORITHM",
        "AIBRIX_PREFIX_CACHE_POD_RUNNING_REQUEST_IMBALANCE_ABS_COUNT", "AIBRIX_PREFILL_REQUEST_TIMEOUT",
        "AIBRIX_PREFIX_CACHE_STANDARD_DEVIATION_FACTOR", "HTTPRoute", "external IP",
        "--llm-backend-discovery", "--llm-backend-endpoints", "--pd-disagg-protocol",
        "--separate-pd-scheduling", "--route-policy", "--route-config", "--retry-max-count",
        *(f"--discovery-redis-{name}" for name in (
            "host", "port", "username", "password", "socket-timeout", "retry-times", "status-ttl-ms",
            "refresh-interval-ms",
        )),
        *(f"--discovery-etcd-{name}" for name in (
            "endpoints", "username", "password", "dial-timeout", "lease-ttl", "refresh-interval-sec",
        )),
        *(f"--fallback-retry-{name}" for name in (
            "queue-enabled", "queue-size", "worker-size", "max-count", "init-delay-ms", "max-delay-ms",
        )),
    ):  # fmt: skip
        assert f"{value}`" in text or (value in text.replace("`", "") and not value.startswith("--")), value


@cache
def metrics() -> frozenset[str]:
    """Names in the code, as they stand or put together from literals of the same package."""
    names: set[str] = set()
    for package in ("libs/common", "libs/sim", *(f"services/{service}" for service in SERVICES)):
        text = "".join(path.read_text() for path in committed(f"{package}/src/*.py"))
        names |= set(re.findall(r"\"(penstock_[a-z0-9_]+)\"", text))
        literals = set(re.findall(r"\"([a-z0-9_]+)\"", text))
        for before, after in re.findall(r"f\"(penstock_[a-z_]*)\{[^{}\"]*\}([a-z_]*)\"", text):
            names |= {f"{before}{one}{after}" for one in literals}
    return frozenset(names)


@pytest.mark.parametrize("path", [*CURRENT, *DEPLOYED], ids=name_of)
def test_every_metric_that_is_named_exists(path: Path) -> None:
    for name in set(re.findall(r"\bpenstock_[a-z0-9_]*[a-z0-9]\b", path.read_text())):
        base = re.sub(r"_(bucket|sum|count|created)$", "", name)
        known = metrics()
        # In a table, or with braces, a name's beginning stands for several.
        assert {name, base} & known or any(one.startswith(f"{name}_") for one in known), name


@cache
def paths() -> frozenset[str]:
    """Of both OpenAPI documents, parameters as `{}`."""
    made = set()
    for name in ("openapi.yaml", "openapi-admin.yaml"):
        document = yaml.safe_load((TREE / "docs" / "reference" / name).read_text())
        made |= {re.sub(r"\{[^}]*\}", "{}", path) for path in document["paths"]}
    return frozenset(made | {"/admin/api/openapi.json"})


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_every_path_of_the_apis_that_is_named_exists(path: Path) -> None:
    for named in set(re.findall(r"(?<![\w.])(/admin/[A-Za-z0-9/{}<>_.:%-]*[A-Za-z}>])", path.read_text())):
        pattern = re.sub(r"\{[^}]*\}|<[^>]*>", "{}", named)
        assert any(fits(pattern, known) for known in paths()), named


def fits(named: str, known: str) -> bool:
    """Whether `named` is `known` with its parameters filled in, or a beginning of it."""
    ours, theirs = named.strip("/").split("/"), known.strip("/").split("/")
    return len(ours) <= len(theirs) and all(
        one == other or other == "{}" or one == "{}" for one, other in zip(ours, theirs, strict=False)
    )


@pytest.mark.parametrize("path", [*CURRENT, *DEPLOYED], ids=name_of)
def test_probes_are_asked_at_the_paths_that_there_are(path: Path) -> None:
    asked = set(re.findall(r":80\d\d(/[a-z]+z?)\b", path.read_text()))
    served = {"/livez", "/readyz", "/metrics", "/health", "/healthz", "/v", "/admin", "/sim", "/query"}
    assert asked <= served | {one for one in asked if one.startswith("/v1")}


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_every_subject_and_event_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    patterns = [subject.pattern for subject in subjects.SUBJECTS]
    patterns += [subject for stream in subjects.STREAMS for subject in stream.subjects]
    families = {pattern.split(".")[2] for pattern in patterns} | {"limits"}
    for family in re.findall(r"\bpenstock\.v1\.([a-z-]+)", text):
        assert family in families, family
    for kind in re.findall(r"\bpenstock\.([a-z-]+)\.v1\b", text):
        assert kind in TYPES, kind


def test_what_the_streams_and_buckets_reserve_fits_into_the_deployed_server() -> None:
    """NATS refuses a stream whose bound is above what is left of its own."""
    config = (TREE / "deploy" / "k8s" / "base" / "nats" / "nats.conf").read_text()
    units = {"MiB": 1024**2, "GiB": 1024**3}
    bounds = {
        kind: int(number) * units[unit]
        for kind, number, unit in re.findall(r"max_(file|memory)_store: (\d+)(\w+)", config)
    }
    wanted = {"file": 0, "memory": 0}
    for stream in subjects.STREAMS:
        wanted[stream.storage] += stream.max_bytes
    wanted["file"] += sum(bucket.max_bytes for bucket in subjects.BUCKETS)
    wanted["memory"] += sum(counters.max_bytes for counters in subjects.COUNTERS)
    assert wanted["file"] <= bounds["file"]
    assert wanted["memory"] <= bounds["memory"]


def test_reference_pages_are_all_listed_in_the_index() -> None:
    text = (TREE / "docs" / "index.md").read_text()
    for page in docs.pages():
        if page.startswith(docs.TABLES):
            assert page.removeprefix("docs/") in text, page
