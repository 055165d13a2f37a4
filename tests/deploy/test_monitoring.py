"""Dashboards, alert rules and runbooks name only what exists, and each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from penstock.cli.explain import ExplainSettings
from penstock.cli.metric_families import families
from penstock.cli.tap import TapSettings
from penstock.cli.up_settings import SERVICES, UpSettings
from penstock.common.settings import Settings, describe

TREE = Path(__file__).resolve().parents[2]
MONITORING, RUNBOOKS = TREE / "deploy" / "monitoring", TREE / "docs" / "runbooks"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((MONITORING / "penstock.rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in (MONITORING / "dashboards").glob("*.json")}
KNOWN = families()
# What a histogram gives besides, and what Prometheus adds to everything it scrapes.
SUFFIXES = ("_bucket", "_sum", "_count")
OF_SCRAPES = {"job", "instance"}
FUNCTIONS = {"sum", "rate", "max", "min", "increase", "histogram_quantile", "by", "and", "or"}
SELECTOR = re.compile(r"(?P<name>[a-z_:][a-z0-9_:]*)(?:\{(?P<matchers>[^}]*)\})?", re.IGNORECASE)


def expressions() -> Iterator[tuple[str, str, str]]:
    """(where, PromQL, legend) of every panel and rule."""
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield f"{name}: {panel['title']}", target["expr"], target["legendFormat"]
    for rule in RULES:
        yield rule["alert"], rule["expr"], rule["annotations"]["summary"]


EXPRESSIONS = list(expressions())


def named_metrics(text: str) -> set[str]:
    return set(re.findall(r"\bpenstock_[a-z0-9_]+\b", text))


def family_of(metric: str) -> str:
    """The metric that a series belongs to."""
    for suffix in SUFFIXES:
        base = metric.removesuffix(suffix)
        if base != metric and base in KNOWN and KNOWN[base][0].kind == "histogram":
            return base
    return metric


@pytest.mark.parametrize(("where", "expression", "legend"), EXPRESSIONS, ids=[e[0] for e in EXPRESSIONS])
def test_metrics_and_labels_exist(where: str, expression: str, legend: str) -> None:
    metrics = {family_of(metric) for metric in named_metrics(expression)}
    assert metrics <= KNOWN.keys(), where
    labels = OF_SCRAPES | {label for metric in metrics for label in KNOWN[metric][0].label_names}
    histogram = any(KNOWN[metric][0].kind == "histogram" for metric in metrics)
    used = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
    used |= {m for match in SELECTOR.finditer(expression) for m in re.findall(r"(\w+)\s*=", match[2] or "")}
    assert used <= labels | ({"le"} if histogram else set()), where
    shown = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", legend))
    kept = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
    assert shown <= (kept if kept else labels), where


@pytest.mark.parametrize(("where", "expression", "legend"), EXPRESSIONS, ids=[e[0] for e in EXPRESSIONS])
def test_counters_are_rated_and_gauges_are_not(where: str, expression: str, legend: str) -> None:
    for metric in named_metrics(expression):
        family, _ = KNOWN[family_of(metric)]
        rated = re.search(rf"(rate|increase)\({metric}\b", expression)
        assert bool(rated) == (family.kind != "gauge"), (where, metric)


@pytest.mark.parametrize(("where", "expression", "legend"), EXPRESSIONS, ids=[e[0] for e in EXPRESSIONS])
def test_expressions_are_promql(where: str, expression: str, legend: str) -> None:
    """Functions and the types of their arguments too; with a range where Grafana puts one in."""
    promql_parser.parse(expression.replace("$__rate_interval", "1m"))


@pytest.mark.parametrize("broken", ["sum(rate(a[1m])", "rate(a)", "sum by (x (a)", "nothing_such(a)", "a >"])
def test_what_is_no_promql_is_found(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse(broken)


def test_rules_have_the_form_that_prometheus_reads() -> None:
    """Unknown keys stop its start."""
    document = yaml.safe_load((MONITORING / "penstock.rules.yaml").read_text())
    assert document.keys() == {"groups"}
    names = [group["name"] for group in document["groups"]]
    assert len(set(names)) == len(names)
    for group in document["groups"]:
        assert group.keys() <= {"name", "interval", "rules"}
    for rule in RULES:
        assert {"alert", "expr", "labels", "annotations"} <= rule.keys() <= {
            "alert", "expr", "for", "keep_firing_for", "labels", "annotations",
        }  # fmt: skip
        assert re.fullmatch(r"(\d+(ms|[smhdwy]))+", rule.get("for", "0s"))
        values = re.compile(r"\{\{ *(\$labels\.\w+|\$value( \| humanize\w*)?) *\}\}")
        assert all("{" not in values.sub("", text) for text in rule["annotations"].values())


def test_values_of_labels_that_rules_ask_for_are_written_in_the_code() -> None:
    code = "".join(path.read_text() for path in TREE.glob("services/*/src/**/*.py"))
    code += "".join(path.read_text() for path in TREE.glob("libs/common/src/**/*.py"))
    for where, expression, _ in EXPRESSIONS:
        for label, values in re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', expression):
            for value in values.split("|") if label not in OF_SCRAPES else ():
                assert f'"{value}"' in code, (where, value)


def test_every_metric_but_those_of_the_sidecar_is_on_a_dashboard_or_in_a_rule() -> None:
    shown = {family_of(metric) for _, expression, _ in EXPRESSIONS for metric in named_metrics(expression)}
    rest = {name for name, (_, services) in KNOWN.items() if services != ["register"]} - shown
    # Told by others on the same page, or of use in a search for a fault only.
    assert len(rest) <= 40, sorted(rest)


def test_dashboards_are_whole() -> None:
    assert DASHBOARDS.keys() == {"requests", "scheduling", "discovery", "mirror", "bus"}
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
    for name, dashboard in DASHBOARDS.items():
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
        places: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            grid = panel["gridPos"]
            cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in (grid["y"],)}
            assert not places & cells, (name, panel["title"])
            places |= cells
            for target in panel.get("targets", ()):
                assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_each_alert_has_its_runbook_and_each_runbook_its_alert() -> None:
    alerts = {rule["alert"] for rule in RULES}
    assert len(alerts) == len(RULES)
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == alerts | {"README"}
    index = (RUNBOOKS / "README.md").read_text()
    for rule in RULES:
        name = rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/runbooks/{name}.md"
        page = (RUNBOOKS / f"{name}.md").read_text()
        assert page.startswith(f"# {name}\n")
        assert f"`{rule['labels']['severity']}`" in page
        assert "**What users see.**" in page
        assert "\n## Look\n" in page
        assert "\n## Do\n" in page
        assert f"| [{name}]({name}.md) | {rule['labels']['severity']} |" in index


@pytest.mark.parametrize("page", [*sorted(RUNBOOKS.glob("*.md")), TREE / "docs/guide/observability.md"])
def test_pages_name_metrics_and_flags_that_exist(page: Path) -> None:
    text = page.read_text()
    assert {family_of(metric) for metric in named_metrics(text)} <= KNOWN.keys()
    programs: list[type[Settings]] = [*SERVICES.values(), UpSettings, TapSettings, ExplainSettings]
    # The first two are vLLM's.
    known = {
        "--enable-prompt-tokens-details",
        "--otlp-traces-endpoint",
        "--profile",
        "--wait",
        "--namespace",
        "--scale",
    }
    known |= {flag for cls in programs for flag, *_ in describe(cls)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
    for link in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in link:
            assert (page.parent / link).resolve().exists(), link


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "penstock.rules.yaml"),
        ("test", "rules", "rules_test.yaml"),
        ("check", "config", "--syntax-only", "prometheus.yaml"),
    ],
)
def test_promtool_takes_rules_and_configuration(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
def test_promtool_parses_every_panel(tmp_path: Path) -> None:
    """As recording rules, with a fixed range where Grafana puts one in."""
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, (_, expression, _) in enumerate(EXPRESSIONS)
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
