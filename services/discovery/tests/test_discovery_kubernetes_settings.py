"""Settings of the Kubernetes source: presets, what replaces them, and what stops the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.common.settings import SettingsError, load
from penstock.discovery.kubernetes_settings import KubernetesSettings


def read(**flags: str) -> KubernetesSettings:
    argv = [f"--discovery-kubernetes-{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return load(KubernetesSettings, argv, prog="penstock discovery", environ={})


@pytest.mark.parametrize(
    ("preset", "kind", "selector", "port"),
    [
        ("none", "pods", "penstock/discover=true", ""),
        ("llm-d", "services", "llm-d.ai/role=decode", ""),
        ("aibrix", "pods", "model.aibrix.ai/name", "8000"),
    ],
)
def test_a_preset_says_what_is_watched(preset: str, kind: str, selector: str, port: str) -> None:
    settings = read(preset=preset)
    assert (settings.kubernetes_kind(), settings.kubernetes_selector()) == (kind, selector)
    assert settings.kubernetes_rules().port == port


def test_every_part_of_a_preset_can_be_replaced() -> None:
    settings = read(
        preset="aibrix", kind="services", selector="a=b", port="http", map="owner=label:team,role="
    )
    assert (settings.kubernetes_kind(), settings.kubernetes_selector()) == ("services", "a=b")
    rules = settings.kubernetes_rules()
    assert (rules.port, rules.places["owner"], rules.places["role"]) == ("http", ("label:team",), ())
    assert rules.places["model"][0] == "label:model.aibrix.ai/name"


@pytest.mark.parametrize(
    ("text", "names"), [("", ()), ("*", ("*",)), (" a, b,,a ", ("a", "b"))], ids=["own", "all", "some"]
)
def test_namespaces_are_a_list(text: str, names: tuple[str, ...]) -> None:
    assert read(namespace=text).kubernetes_namespaces() == names


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("preset", "vllm", "'none', 'llm-d' or 'aibrix'"),
        ("kind", "nodes", "'pods'"),
        ("namespace", "Bad_Name", "'Bad_Name' is not the name of a namespace"),
        ("namespace", "*,a", "give it alone"),
        ("namespace", ",".join(f"n{n}" for n in range(65)), "over 64"),
        ("selector", "a=b&limit=1", "not a label selector"),
        ("port", "no port", "neither a number"),
        ("port", "70000", "65535"),
        ("map", "modell=label:a", "'modell' is no field"),
        ("kubeconfig", "/nowhere/at/all", "no such file"),
        ("timeout", "0", "greater than 0"),
        ("silence_sec", "0", "0.1"),
        ("refresh_interval_sec", "0", "0.1"),
        ("page_size", "0", "1"),
    ],
)
def test_a_fault_names_flag_and_value(name: str, value: str, word: str) -> None:
    with pytest.raises(SettingsError) as told:
        read(**{name: value})
    assert f"--discovery-kubernetes-{name.replace('_', '-')}" in str(told.value)
    assert word in str(told.value)
    assert value[:20] in str(told.value)


def test_a_kubeconfig_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("{}")
    assert read(kubeconfig=str(path)).discovery_kubernetes_kubeconfig == path
