"""Policies of the operator's own: found, asked, checked, replaced when they fail."""

from __future__ import annotations

import re
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.common.messages import Placement, ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.settings import SettingsError, load
from penstock.scheduler.bench import table_of
from penstock.scheduler.decisions import Decision
from penstock.scheduler.plugins import GROUP, PluginError
from penstock.scheduler.plugins import load as load_policies
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.custom import CandidateView
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.scheduler import schedule
from penstock.scheduler.settings import SchedulerSettings
from penstock.scheduler.view import ClusterView

GUIDE = Path(__file__).parents[3] / "docs/guide/policies.md"


def decide(policy: Callable[..., Any], strategy: str = "mine", **more: object) -> Decision:
    """By `policy` over a (4 in flight, two of three blocks), b (2, zone x), c (0)."""
    view, index = ClusterView(), PrefixIndex(1000)
    instances = [
        Instance(id=name, endpoint=Endpoint("h", 1), models=("m",), labels={"zone": zone})
        for name, zone in (("a", ""), ("b", "x"), ("c", ""))
    ]
    view.refresh(table_of(instances), index.forget)
    view.take([("a", 4, 400, 50), ("b", 2, 200, 0)])
    slot = view.slot("a")
    assert slot is not None
    index.insert([1, 2], slot)
    hashes = struct.pack("<3Q", 16, 32, 48)
    request = ScheduleRequest("d", "r", "m", strategy=strategy, prompt_tokens=300, block_hashes=hashes)
    request = msgspec.structs.replace(request, **more)
    catalog = Catalog(Thresholds(), {"mine": policy})
    return schedule(request, view, index, catalog, default="random", replicas=1)


def test_a_policy_of_ones_own_decides() -> None:
    for wanted in "abc":
        decision = decide(lambda request, pool, wanted=wanted: [one == wanted for one in pool.ids])
        assert isinstance(decision.outcome, Placement)
        assert (decision.outcome.instance, decision.outcome.policy) == (wanted, "mine")
        assert decision.fault is None


def test_it_sees_what_the_others_see() -> None:
    seen: dict[str, Any] = {}

    def look(request: ScheduleRequest, pool: CandidateView) -> list[float]:
        for name in vars(CandidateView):
            if not name.startswith("_"):
                seen[name] = getattr(pool, name)
        seen["prompt"] = request.prompt_tokens
        return [1.0] * len(pool)

    decide(look)
    assert seen["prompt"] == 300
    assert (seen["ids"], seen["instances"][1].labels) == (("a", "b", "c"), {"zone": "x"})
    assert (seen["requests"].tolist(), seen["tokens"].tolist()) == ([4, 2, 0], [400, 200, 0])
    assert seen["prefill_tokens"].tolist() == [50, 0, 0]
    assert seen["matched_ratio"].tolist() == pytest.approx([2 / 3, 0, 0])
    assert seen["expected_ttft_ms"][2] == pytest.approx(300 * 0.125)
    assert (seen["ms_per_prompt_token"] > 0).all()
    assert (seen["ms_per_output_token"] > 0).all()


def test_what_it_does_to_its_arrays_stays_with_it() -> None:
    def vandal(request: ScheduleRequest, pool: CandidateView) -> list[float]:
        for name in ("requests", "tokens", "prefill_tokens", "kv_used", "matched_ratio", "expected_ttft_ms"):
            getattr(pool, name)[:] = np.nan
        return [0.0, 1.0, 0.0]

    decision = decide(vandal)
    assert (decision.terms[0].instance, decision.terms[0].in_flight) == ("b", 2)


def raises(request: ScheduleRequest, pool: CandidateView) -> list[float]:
    raise KeyError("zone")


def leaves(request: ScheduleRequest, pool: CandidateView) -> list[float]:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (raises, "raised"),
        (leaves, "raised"),
        (lambda request, pool: [[1.0, 2.0], [3.0]], "raised"),
        (lambda: [], "raised"),
        (lambda request, pool: None, "type"),
        (lambda request, pool: ["a", "b", "c"], "type"),
        (lambda request, pool: [1j, 0, 0], "type"),
        (lambda request, pool: 1.0, "shape"),
        (lambda request, pool: [], "shape"),
        (lambda request, pool: [1.0, 0.0], "shape"),
        (lambda request, pool: [[1.0, 0.0, 0.0]], "shape"),
        (lambda request, pool: [0.5, float("nan"), 0.5], "not-finite"),
        (lambda request, pool: [0.5, float("inf"), 0.5], "not-finite"),
        (lambda request, pool: [0.5, 1.01, 0.5], "range"),
        (lambda request, pool: [-0.1, 0.5, 0.5], "range"),
    ],
)
@pytest.mark.parametrize("strategy", ["mine", "mine:1,least-request:1"])
def test_a_fault_costs_the_policy_its_decision_and_nobody_an_answer(
    policy: Callable[..., Any], kind: str, strategy: str
) -> None:
    decision = decide(policy, strategy)
    assert isinstance(decision.outcome, Placement)
    assert (decision.outcome.instance, decision.outcome.policy) == ("c", "least-request")
    assert decision.fault is not None
    assert (decision.fault.policy, decision.fault.kind) == ("mine", kind)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_file_brings_policies_that_may_be_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "POLICIES = {'first': lambda request, pool: [1.0] + [0.0] * (len(pool) - 1)}")
    settings = load(
        SchedulerSettings,
        ["--policy-module", str(path), "--default-routing-strategy", "first:2,least-request:1"],
        prog="scheduler",
        environ={},
    )
    assert set(settings.custom_policies) == {"first"}
    assert decide(settings.custom_policies["first"]).outcome.instance == "a"  # type: ignore[union-attr]  # placed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("POLICIES = {'random': print}", "random is a policy of Penstock's own"),
        ("POLICIES = {'Not A Name': print}", "is no name of a policy"),
        ("POLICIES = {3: print}", "3 is no name of a policy"),
        ("POLICIES = {'mine': 5}", "mine cannot be called"),
        ("POLICIES = {}", "has no POLICIES"),
        ("x = 1", "has no POLICIES"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(9)", "SystemExit"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_start_with_the_reason(
    text: str, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=re.escape(says)) as error:
        load(SchedulerSettings, ["--policy-module", str(path)], prog="scheduler", environ={})
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"nowhere\.py"):
        load_policies((tmp_path / "nowhere.py",))


def test_an_installed_package_brings_policies_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zone_policy.py").write_text("def near(request, pool):\n    return [1.0] * len(pool)\n")
    info = tmp_path / "zone_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zone-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nnear-zone = zone_policy:near\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_policies.cache_clear()
    assert set(load_policies(())) == {"near-zone"}
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nnear-zone = zone_policy:gone\n")
    load_policies.cache_clear()
    with pytest.raises(PluginError, match="near-zone = zone_policy:gone: AttributeError"):
        load_policies(())
    load_policies.cache_clear()


def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    policies = load_policies((write(tmp_path, example[1]),))
    assert set(policies) == {"near-zone"}
    decision = decide(policies["near-zone"])
    assert decision.fault is None
    near = decide(policies["near-zone"], session="x/42")
    assert near.fault is None
    assert isinstance(near.outcome, Placement)
    assert near.outcome.instance == "b"
