"""Route configurations: what is taken, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.common.settings import SettingsError, describe, load, reveal
from penstock.ingress.route_config import RouteFaults, document, warnings
from penstock.ingress.route_settings import proxy_from_environment
from penstock.ingress.settings import IngressSettings

WHERE = "--route-config"
KEY = "sk-never-shown"


def read(*argv: str) -> IngressSettings:
    return load(IngressSettings, argv, prog="penstock ingress", environ={})


def faults(policy: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(SettingsError) as caught:
        read(f"--route-policy={policy}", f"--route-config={text}")
    assert KEY not in str(caught.value)
    return str(caught.value)


def entry(**fields: Any) -> list[dict[str, Any]]:
    return [{"base_url": "http://a:1", "weight": 1, **fields}]


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--route-policy", ""),
        ("--route-config", ""),
        ("--retry-max-count", "0"),
        ("--fallback-retry-queue-enabled", "false"),
        ("--fallback-retry-queue-size", "100"),
        ("--fallback-retry-worker-size", "10"),
        ("--fallback-retry-max-count", "3"),
        ("--fallback-retry-init-delay-ms", "500"),
        ("--fallback-retry-max-delay-ms", "5000"),
    ],
)
def test_flags_have_the_defaults_of_the_reference(flag: str, default: str) -> None:
    assert {row[0]: row[2] for row in describe(IngressSettings)}[flag] == default


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{", "--route-config: is no JSON (Expecting property name"),
        (
            '{"base_url": "local"}',
            '--route-config: must be an array such as [{"base_url": "local"}], is a dict',
        ),
        (["local"], '--route-config[0]: must be an object such as {"base_url": "local"}, got \'local\''),
        ([{"weight": 1}], "--route-config[0].base_url: is required"),
        (entry(wieght=1), "--route-config[0].wieght: is no field of a route"),
        (entry(base_url="ftp://a"), '[0].base_url: is no http or https URL; give "local" or http(s)://host'),
        (entry(base_url="Local"), '[0].base_url: is no http or https URL; give "local" or'),
        (entry(base_url="http://"), "[0].base_url: has no valid host and port"),
        (entry(base_url="http://a:99999"), "[0].base_url: is no URL (Port out of range 0-65535)"),
        (entry(base_url="http://a b"), "[0].base_url: is no http or https URL"),
        (entry(base_url="http://a\r\nx: y"), "[0].base_url: is no http or https URL"),
        (entry(base_url="http://a/v1?key=1"), "[0].base_url: has a query or a fragment"),
        (entry(base_url=f"http://user:{KEY}@a"), "[0].base_url: holds credentials; give them as api_key"),
        (entry(weight=-1), "[0].weight: input should be greater than or equal to 0, got -1"),
        (entry(weight=1.5), "[0].weight: must be a whole number, got 1.5"),
        (entry(weight="50"), "[0].weight: must be a whole number, got '50'"),
        (entry(weight=True), "[0].weight: must be a whole number, got True"),
        (entry(weight=10**7), "[0].weight: input should be less than or equal to 1000000"),
        (entry(fallback="yes"), "[0].fallback: must be true or false, got 'yes'"),
        (entry(api_key=KEY + "\n"), "[0].api_key: string should match pattern"),
        (entry(base_url="local", api_key=KEY), "[0]: local takes no api_key"),
        (entry(api_key=KEY, forward_authorization=True), "[0]: api_key and forward_authorization exclude"),
        (entry(rewrite_model=True), "[0]: rewrite_model needs model, the name to send"),
        (entry(canary_header="x-canary"), "[0]: a canary takes its own requests and no share; remove weight"),
        (entry(canary_header="not a header", weight=0), "[0].canary_header: is no header"),
        (
            entry(canary_percent=101, weight=0),
            "[0].canary_percent: input should be less than or equal to 100",
        ),
        (entry(name="x") + entry(name="x"), "more than one route has the name 'x'; names are unique"),
        (entry(weight=None), "[0].weight: is required with the policy weight unless fallback is true"),
        (entry(weight=0), "no route has a weight above 0 and none is a fallback: nothing would be served"),
        (entry() * 257, "--route-config: holds at most 256 routes"),
    ],
)
def test_a_bad_weight_configuration_names_field_value_and_remedy(value: Any, message: str) -> None:
    text = faults("weight", value)
    assert message in text
    assert WHERE in text


def test_the_policy_prefix_needs_prefixes() -> None:
    assert "[0].prefix: is required with the policy prefix unless fallback is true" in faults(
        "prefix", entry()
    )
    assert "[0].prefix: string should have at least 1 character" in faults("prefix", entry(prefix=""))


def test_all_faults_are_told_at_once() -> None:
    text = faults("weight", [{"base_url": "nope"}, {"base_url": "local", "weight": -1, "fallback": 1}])
    for field in ("[0].base_url", "[1].weight", "[1].fallback"):
        assert f"{WHERE}{field}: " in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--route-policy=weight"], "--route-policy weight needs --route-config: give the routes"),
        (["--route-config=[]"], "--route-config needs --route-policy: give weight or prefix"),
        (["--route-policy=round-robin"], "--route-policy: Input should be '', 'weight' or 'prefix'"),
        (
            ["--route-policy=weight", "--route-config=/no/such/file"],
            "--route-config: is neither a JSON array nor a file that can be read (No such file or directory)",
        ),
        (
            ["--fallback-retry-init-delay-ms=9000"],
            "is above --fallback-retry-max-delay-ms (5000): raise the latter",
        ),
        (
            ["--fallback-retry-max-count=-2"],
            "--fallback-retry-max-count: Input should be greater than or equal to -1",
        ),
        (["--fallback-retry-worker-size=0"], "--fallback-retry-worker-size: "),
        (["--ejection-max-percent=101"], "--ejection-max-percent: "),
        (["--route-tls-ca=/no/such/file"], "--route-tls-ca: cannot be read as PEM certificates"),
    ],
)
def test_flags_that_do_not_fit_together_stop_the_start(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(*argv)
    assert message in str(caught.value)


def test_a_file_a_yaml_list_and_json_text_are_the_same(tmp_path: Path) -> None:
    routes = [{"base_url": "local", "weight": 50}, {"base_url": "http://a:1", "weight": 50, "api_key": KEY}]
    file, config = tmp_path / "routes.json", tmp_path / "config.yaml"
    file.write_text(json.dumps(routes))
    config.write_text(
        "route-policy: weight\nroute-config:\n" + "".join(f"- {json.dumps(r)}\n" for r in routes)
    )
    given = [
        read("--route-policy=weight", f"--route-config={json.dumps(routes)}"),
        read("--route-policy=weight", f"--route-config={file}"),
        read(f"--config={config}"),
    ]
    documents = [settings.routes() for settings in given]
    assert documents[0] is not None
    assert documents == [documents[0]] * 3
    assert KEY not in repr(given)
    assert KEY not in repr(documents)
    # Workers get what the parent read, whatever became of the file.
    file.unlink()
    assert IngressSettings.model_validate(reveal(given[1])).routes() == documents[0]


@pytest.mark.parametrize("content", [b"", b"not json", b'{"base_url": "local"}', b"\xff[", b"[" * 2_000_000])
def test_a_file_that_holds_no_array_stops_the_start(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "routes.json"
    file.write_bytes(content)
    assert "--route-config" in faults("weight", str(file))


def test_a_document_of_the_admin_api_is_held_to_the_same_rules() -> None:
    assert document({"policy": "weight", "routes": entry()}).policy == "weight"
    with pytest.raises(RouteFaults) as caught:
        document({"policy": "random", "routes": [{"base_url": "x"}], "more": 1})
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "routes.policy",
        "routes[0].base_url",
        "routes.more",
    ]
    values: tuple[Any, ...] = (None, [], "x", {"policy": "weight"}, {"policy": "weight", "routes": {}})
    for value in values:
        with pytest.raises(RouteFaults):
            document(value)


def test_local_as_a_fallback_is_a_warning() -> None:
    given = document({"policy": "weight", "routes": [{"base_url": "local", "weight": 1, "fallback": True}]})
    assert list(warnings(given.routes)) == ["route 0: local is never a fallback, its fallback is ignored"]


@pytest.mark.parametrize(
    ("variables", "target", "proxy"),
    [
        ({}, ("https", "a.com", 443), None),
        ({"https_proxy": "http://p:3128"}, ("https", "a.com", 443), ("p", 3128, "")),
        ({"HTTPS_PROXY": "p:3128"}, ("https", "a.com", 443), ("p", 3128, "")),
        ({"https_proxy": "http://p:3128"}, ("http", "a.com", 80), None),
        ({"all_proxy": "http://p"}, ("http", "a.com", 80), ("p", 80, "")),
        ({"http_proxy": "http://us%40r:pw@p:1"}, ("http", "a.com", 80), ("p", 1, "Basic dXNAcjpwdw==")),
        ({"http_proxy": "http://p:1", "no_proxy": "a.com"}, ("http", "a.com", 80), None),
        ({"http_proxy": "http://p:1", "no_proxy": ".a.com"}, ("http", "x.a.com", 80), None),
        ({"http_proxy": "http://p:1", "no_proxy": "*"}, ("http", "a.com", 80), None),
        ({"http_proxy": "socks5://p:1"}, ("http", "a.com", 80), None),
    ],
)
def test_proxies_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    target: tuple[str, str, int],
    proxy: tuple[str, int, str] | None,
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_from_environment(*target) == proxy
