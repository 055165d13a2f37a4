"""The list of metrics is whole, and keeps Prometheus's naming rules."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.cli.metric_families import families

TREE = Path(__file__).resolve().parents[3]
KNOWN = families()
MAKERS = {"counter", "gauge", "histogram", "tally", "level"}


def named_in_the_code() -> Iterator[str]:
    """What is a plain string where a metric is made."""
    for path in [*TREE.glob("libs/common/src/**/*.py"), *TREE.glob("services/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            maker = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if maker in MAKERS and str(node.args[0].value).startswith("penstock_"):
                yield str(node.args[0].value)


def test_every_metric_that_the_code_makes_is_in_the_list() -> None:
    named = set(named_in_the_code())
    assert len(named) > 80
    assert named <= KNOWN.keys(), "build what makes them in penstock.cli.metric_families"


@pytest.mark.parametrize("name", KNOWN)
def test_names_keep_prometheus_rules(name: str) -> None:
    family, services = KNOWN[name]
    assert re.fullmatch(r"penstock(_[a-z0-9]+)+", name)
    assert name.endswith("_total") == (family.kind == "counter")
    assert not re.search(r"_(ms|millis\w*|minutes|kib|mib|percent|count|sum|bucket)(_|$)", name)
    if family.kind == "histogram":
        assert name.endswith("_seconds")
    assert family.help[0].isupper() or family.help[0] == "1"
    assert not family.help.endswith(".")
    assert not {"le", "quantile", "request_id", "user"} & set(family.label_names)
    assert services


def test_a_service_has_a_prefix_of_its_own() -> None:
    for name, (_, services) in KNOWN.items():
        word = name.split("_")[1]
        if word in ("ingress", "scheduler", "discovery", "mirror", "register"):
            assert services == [word], name
