"""Kubernetes objects become instances: the presets' objects, free rules, and what is passed over."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.kubernetes_instances import MAX_LABELS, MAX_RECORD_BYTES, Found, find
from penstock.discovery.kubernetes_rules import (
    FIELDS,
    PRESETS,
    Kind,
    Rules,
    check_selector,
    parse_places,
    parse_ports,
)

AIBRIX_CONFIG = '{"defaultProfile": "default", "profiles": {"default": {"routingStrategy": "pd"}}}'

# As a Deployment of AIBrix makes them, shortened where nothing is read.
AIBRIX_POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "llama-roleset-x7-prefill-0",
        "namespace": "serving",
        "labels": {
            "model.aibrix.ai/name": "llama-8b",
            "model.aibrix.ai/port": "8001",
            "model.aibrix.ai/engine": "sglang",
            "adapter.model.aibrix.ai/enabled": "true",
            "roleset-name": "llama-roleset-x7",
            "role-name": "prefill",
            "stormservice.orchestration.aibrix.ai/pod-group-index": "0",
        },
        "annotations": {"model.aibrix.ai/config": AIBRIX_CONFIG},
        "ownerReferences": [{"kind": "RoleSet", "name": "llama-roleset-x7"}],
    },
    "spec": {
        "containers": [
            {
                "name": "engine",
                "command": ["python3", "-m", "sglang.launch_server"],
                "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                "ports": [
                    {"containerPort": 8001, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": 9090},
                ],
            },
            {"name": "aibrix-runtime", "ports": [{"containerPort": 8080}]},
        ],
    },
    "status": {
        "phase": "Running",
        "podIP": "10.244.3.21",
        "podIPs": [{"ip": "10.244.3.21"}, {"ip": "fd00::21"}],
        "conditions": [
            {"type": "Initialized", "status": "True"},
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
        ],
    },
}

LLM_D_SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {
        "name": "ms-llama-32-1b-llm-d-modelservice-decode",
        "namespace": "llm-d-multi-model",
        "labels": {
            "llm-d.ai/inferenceServing": "true",
            "llm-d.ai/model": "ms-llama-32-1b-llm-d-modelservice",
            "llm-d.ai/role": "decode",
        },
    },
    "spec": {
        "type": "ClusterIP",
        "clusterIP": "10.43.7.9",
        "clusterIPs": ["10.43.7.9"],
        "ports": [{"port": 8000, "protocol": "TCP", "targetPort": 8200}],
        "selector": {"llm-d.ai/role": "decode"},
    },
}


def seen(
    made: dict[str, Any], preset: str = "none", kind: Kind | None = None, *, rules: str = "", port: str = ""
) -> Found:
    """An object as the source reads it."""
    read = PRESETS[preset].rules.with_port(port).with_places(parse_places(rules))
    return find(kind or PRESETS[preset].kind, msgspec.json.encode(made), read, AllowedHosts())


def only(found: Found) -> Instance:
    assert (len(found.instances), found.skipped) == (1, "")
    return found.instances[0]


def changed(made: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A copy with parts replaced; `labels`, `annotations`, `status` and `spec` are merged."""
    copied = copy.deepcopy(made)
    for name, part in parts.items():
        home = copied if name in ("status", "spec") else copied["metadata"]
        home[name] = {**(home.get(name) or {}), **part} if isinstance(part, dict) else part
    return copied


def pod(*ports: tuple[str, int], **parts: Any) -> dict[str, Any]:
    """A ready pod with these ports and nothing else."""
    containers = [{"ports": [{"name": name, "containerPort": number} for name, number in ports]}]
    made: dict[str, Any] = {
        "metadata": {"name": "p", "namespace": "ns"},
        "spec": {"containers": containers},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
    return changed(made, **parts)


class TestPresets:
    def test_an_aibrix_pod_says_model_port_engine_role_group_and_configuration(self) -> None:
        assert only(seen(AIBRIX_POD, "aibrix")) == Instance(
            id="llama-roleset-x7-prefill-0.serving",
            endpoint=Endpoint("10.244.3.21", 8001),
            models=("llama-8b",),
            role=Role.PREFILL,
            engine="sglang",
            group="llama-roleset-x7",
            bootstrap_port=8998,
            labels=AIBRIX_POD["metadata"]["labels"],
            config=AIBRIX_CONFIG,
        )

    @pytest.mark.parametrize(
        ("labels", "annotations", "expected"),
        [
            ({"role-name": "decode"}, {}, {"role": Role.DECODE}),
            ({"role-name": "combined"}, {}, {"role": Role.NEUTRAL}),
            ({"model.aibrix.ai/engine": "vllm"}, {}, {"bootstrap_port": 0, "engine": "vllm"}),
            ({}, {"model.aibrix.ai/sglang-bootstrap-port": "9000"}, {"bootstrap_port": 9000}),
            ({"model.aibrix.ai/name": ""}, {"model.aibrix.ai/name": "org/m"}, {"models": ("org/m",)}),
            ({"model.aibrix.ai/port": ""}, {}, {"endpoint": Endpoint("10.244.3.21", 8000)}),
            ({"penstock/drain": "true"}, {}, {"state": InstanceState.DRAINING}),
        ],
    )
    def test_an_aibrix_label_or_annotation_shows_in_its_field(
        self, labels: dict[str, str], annotations: dict[str, str], expected: dict[str, Any]
    ) -> None:
        found = only(seen(changed(AIBRIX_POD, labels=labels, annotations=annotations), "aibrix"))
        assert {name: getattr(found, name) for name in expected} == expected

    @pytest.mark.parametrize(
        "labels",
        [
            {"stormservice.orchestration.aibrix.ai/pod-group-index": "1"},
            {"ray.io/node-type": "worker"},
        ],
    )
    def test_followers_of_a_multi_node_engine_are_no_instances(self, labels: dict[str, str]) -> None:
        assert seen(changed(AIBRIX_POD, labels=labels), "aibrix") == Found()

    def test_a_ray_head_is_an_instance(self) -> None:
        assert seen(changed(AIBRIX_POD, labels={"ray.io/node-type": "head"}), "aibrix").instances

    def test_an_aibrix_pod_with_data_parallel_ranks_is_one_instance_per_rank(self) -> None:
        made = copy.deepcopy(AIBRIX_POD)
        made["spec"]["containers"][0]["env"].append({"name": "data-parallel-size", "value": "3"})
        found = seen(made, "aibrix").instances
        assert [(i.id, i.endpoint.port, i.dp_rank, i.dp_size) for i in found] == [
            ("llama-roleset-x7-prefill-0.serving_dp0", 8001, 0, 3),
            ("llama-roleset-x7-prefill-0.serving_dp1", 8002, 1, 3),
            ("llama-roleset-x7-prefill-0.serving_dp2", 8003, 2, 3),
        ]

    def test_an_llm_d_decode_service_takes_whole_requests(self) -> None:
        assert only(seen(LLM_D_SERVICE, "llm-d")) == Instance(
            id="ms-llama-32-1b-llm-d-modelservice-decode.llm-d-multi-model",
            endpoint=Endpoint("10.43.7.9", 8000),
            group="ms-llama-32-1b-llm-d-modelservice",
            labels=LLM_D_SERVICE["metadata"]["labels"],
        )

    def test_own_labels_and_annotations_name_every_field(self) -> None:
        said = {
            "model": "m,n", "lora": "l", "owner": "me", "role": "decode", "engine": "vllm", "group": "g",
            "port": "8000", "scheme": "https", "dp_rank": "1", "dp_size": "2", "kv_address": "9000",
            "bootstrap_port": "8998", "weight": "0.5", "drain": "no", "config": "{}",
        }  # fmt: skip
        assert set(said) == set(FIELDS)
        annotations = {f"penstock/{name}": value for name, value in said.items()}
        found = only(seen(pod(annotations=annotations)))
        assert msgspec.structs.replace(found, labels={}) == Instance(
            id="p.ns", endpoint=Endpoint("10.0.0.1", 8000, "https"), models=("m", "n"), lora_adapters=("l",),
            owner="me", role=Role.DECODE, engine="vllm", group="g", dp_rank=1, dp_size=2,
            kv_address="10.0.0.1:9000", bootstrap_port=8998, weight=0.5, config="{}",
        )  # fmt: skip

    def test_a_free_rule_replaces_the_presets_and_takes_the_first_that_is_there(self) -> None:
        rules = "model=label:app|annotation:name, owner=env:OWNER, role="
        made = pod(("http", 1), annotations={"name": "m", "penstock/role": "nonsense"})
        made["spec"]["containers"][0]["env"] = [{"name": "OWNER", "value": "o"}]
        found = only(seen(made, rules=rules))
        assert (found.models, found.owner, found.role) == (("m",), "o", Role.NEUTRAL)


class TestPorts:
    @pytest.mark.parametrize(
        ("declared", "wanted", "port"),
        [
            ([("", 8000)], "", 8000),
            ([("metrics", 9090), ("http", 8000)], "", 8000),
            ([("metrics", 9090), ("api", 8001)], "api", 8001),
            ([("metrics", 9090)], "8005", 8005),
            ([], "8000", 8000),
        ],
    )
    def test_the_serving_port_is_found(self, declared: list[tuple[str, int]], wanted: str, port: int) -> None:
        assert only(seen(pod(*declared), port=wanted)).endpoint.port == port

    @pytest.mark.parametrize(
        ("declared", "wanted"),
        [([], ""), ([("a", 1), ("b", 2)], ""), ([("a", 1)], "b"), ([("a", 1), ("a", 2)], "a")],
    )
    def test_a_port_that_is_not_known_says_what_to_do(
        self, declared: list[tuple[str, int]], wanted: str
    ) -> None:
        assert "--discovery-kubernetes-port" in seen(pod(*declared), port=wanted).skipped

    def test_a_port_named_https_is_https(self) -> None:
        assert only(seen(pod(("https", 8443)))).endpoint == Endpoint("10.0.0.1", 8443, "https")

    def test_udp_ports_do_not_count_and_sidecars_ports_do(self) -> None:
        made = pod(("", 8200))
        made["spec"]["containers"][0]["ports"].append({"containerPort": 53, "protocol": "UDP"})
        assert only(seen(made)).endpoint.port == 8200
        sidecar = {"restartPolicy": "Always", "ports": [{"name": "http", "containerPort": 8000}]}
        made["spec"]["initContainers"] = [sidecar, {"ports": [{"name": "http", "containerPort": 1}]}]
        assert only(seen(made)).endpoint.port == 8000

    @pytest.mark.parametrize("text", ["8000-8002", "8000,8001,8002"])
    def test_several_ports_are_ranks(self, text: str) -> None:
        found = seen(pod(annotations={"penstock/port": text})).instances
        assert [(i.id, i.endpoint.port, i.dp_rank, i.dp_size) for i in found] == [
            (f"p.ns_dp{rank}", 8000 + rank, rank, 3) for rank in range(3)
        ]

    @pytest.mark.parametrize("text", ["8000-7999", "0", "65536", "1-2-3", "1-65", "1,1", "8000,8000-8001"])
    def test_ports_out_of_bounds_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError):
            parse_ports(text)


class TestStates:
    @pytest.mark.parametrize(
        ("parts", "state"),
        [
            ({}, InstanceState.READY),
            ({"status": {"conditions": []}}, InstanceState.UNHEALTHY),
            (
                {
                    "status": {
                        "conditions": [
                            {"type": "ContainersReady", "status": "True"},
                            {"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady"},
                        ]
                    }
                },
                InstanceState.UNHEALTHY,
            ),
            ({"deletionTimestamp": "2026-01-01T00:00:30Z"}, InstanceState.DRAINING),
            ({"labels": {"penstock/drain": "1"}}, InstanceState.DRAINING),
        ],
    )
    def test_readiness_and_termination_are_states_with_a_reason(
        self, parts: dict[str, Any], state: InstanceState
    ) -> None:
        found = only(seen(pod(("", 1), **parts)))
        assert (found.state, bool(found.reason)) == (state, state is not InstanceState.READY)

    @pytest.mark.parametrize(
        "status",
        [{"podIP": ""}, {"phase": "Failed", "reason": "Evicted"}, {"phase": "Succeeded"}],
    )
    def test_a_pod_without_address_or_with_its_end_behind_it_is_no_instance(
        self, status: dict[str, Any]
    ) -> None:
        assert seen(pod(("", 1), status=status)) == Found()

    def test_ipv6_and_the_hosts_network_are_addresses_like_others(self) -> None:
        found = only(seen(pod(("", 1), status={"podIP": "fd00:0:0::1"}, spec={"hostNetwork": True})))
        assert found.endpoint.url == "http://[fd00::1]:1"

    @pytest.mark.parametrize(
        ("spec", "host"),
        [
            ({"clusterIP": "fd00::5"}, "fd00::5"),
            ({"clusterIP": "None"}, "ms-llama-32-1b-llm-d-modelservice-decode.llm-d-multi-model.svc"),
            (
                {"type": "ExternalName", "clusterIP": "", "externalName": "Engines.example."},
                "engines.example",
            ),
        ],
    )
    def test_a_service_is_at_its_address_or_its_name(self, spec: dict[str, Any], host: str) -> None:
        assert only(seen(changed(LLM_D_SERVICE, spec=spec), "llm-d")).endpoint.host == host

    def test_a_headless_service_is_at_the_port_of_its_pods(self) -> None:
        made = changed(LLM_D_SERVICE, spec={"clusterIP": "None"})
        assert only(seen(made, "llm-d")).endpoint.port == 8200

    def test_a_service_that_is_being_deleted_drains(self) -> None:
        made = changed(LLM_D_SERVICE, deletionTimestamp="2026-01-01T00:00:00Z")
        assert only(seen(made, "llm-d")).state is InstanceState.DRAINING

    def test_every_endpoint_of_a_slice_is_an_instance(self) -> None:
        def at(ip: str, pod: str = "", **conditions: bool) -> dict[str, Any]:
            return {
                "addresses": [ip],
                "conditions": conditions,
                **({"targetRef": {"kind": "Pod", "name": pod}} if pod else {}),
            }

        made = {
            "metadata": {"name": "s-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 8000, "protocol": "TCP"}],
            "endpoints": [
                at("10.0.0.1", "a", ready=True),
                at("10.0.0.2", "b", ready=False),
                at("10.0.0.3", "c", ready=False, serving=True, terminating=True),
                at("10.0.0.4", "d", ready=False, serving=False, terminating=True),
                at("10.0.0.5"),
                {"addresses": []},
            ],
        }
        found = seen(made, kind="endpointslices").instances
        assert [(i.id, i.endpoint.host, i.state) for i in found] == [
            ("a.ns", "10.0.0.1", InstanceState.READY),
            ("b.ns", "10.0.0.2", InstanceState.UNHEALTHY),
            ("c.ns", "10.0.0.3", InstanceState.DRAINING),
            ("s.ns_10.0.0.5", "10.0.0.5", InstanceState.READY),
        ]


class TestHostile:
    @pytest.mark.parametrize(
        ("annotations", "word"),
        [
            ({"role": "king"}, "role"),
            ({"port": "http; drop"}, "port"),
            ({"port": "99999"}, "65535"),
            ({"weight": "nan"}, "weight"),
            ({"weight": "-1"}, "weight"),
            ({"dp_size": "0"}, "dp_size"),
            ({"dp_size": "٣"}, "dp_size"),
            ({"dp_size": "1000"}, "dp_size"),
            ({"dp_rank": "5"}, "dp_rank"),
            ({"port": "8000-8001", "dp_size": "3"}, "dp_size"),
            ({"port": "8000-8001", "dp_rank": "0"}, "dp_rank"),
            ({"scheme": "gopher"}, "scheme"),
            ({"drain": "perhaps"}, "drain"),
            ({"model": "m" * 600}, "512"),
            ({"engine": "e" * 200}, "128"),
            ({"config": "c" * 5000}, "4096"),
            ({"bootstrap_port": "70000"}, "bootstrap_port"),
        ],
    )
    def test_a_value_that_does_not_fit_passes_the_object_over_and_names_it(
        self, annotations: dict[str, str], word: str
    ) -> None:
        said = {f"penstock/{name}": value for name, value in annotations.items()}
        found = seen(pod(("", 8000), annotations=said))
        assert found.instances == ()
        assert word in found.skipped

    @pytest.mark.parametrize(
        ("ip", "word"),
        [
            ("10.0.0.1\r\nx: y", "IP address"),
            ("localhost", "IP address"),
            ("fe80::1%eth0", "IP address"),
            ("169.254.169.254", "link-local"),
            ("0.0.0.0", "one host"),
        ],
    )
    def test_an_address_that_no_pod_has_passes_the_object_over(self, ip: str, word: str) -> None:
        assert word in seen(pod(("", 1), status={"podIP": ip})).skipped

    @pytest.mark.parametrize(
        "data",
        [
            b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"metadata": 5}',
            b'{"metadata": {"labels": {"a": 1}}}', b'{"metadata": {}, "spec": 5, "endpoints": 5}',
            b'{"metadata": {"name": "a"}, "status": ' + b"[" * 100_000,
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["pods", "services", "endpointslices"])
    def test_what_is_no_object_is_passed_over_with_a_reason(self, kind: Kind, data: bytes) -> None:
        found = find(kind, data, Rules(), AllowedHosts())
        assert (found.instances, bool(found.skipped)) == ((), True)

    def test_more_labels_than_the_bound_are_cut_and_huge_ones_pass_the_object_over(self) -> None:
        many = {f"l{n:03}": "v" for n in range(200)}
        assert len(only(seen(pod(("", 1), labels=many))).labels) == MAX_LABELS
        huge = {f"l{n}": "v" * 500 for n in range(60)}
        assert str(MAX_RECORD_BYTES) in seen(pod(("", 1), labels=huge)).skipped

    def test_an_external_name_that_is_no_name_passes_the_service_over(self) -> None:
        made = changed(LLM_D_SERVICE, spec={"type": "ExternalName", "externalName": "a b\r\n"})
        assert "DNS name" in seen(made, "llm-d").skipped

    def test_a_slice_with_too_many_endpoints_is_passed_over(self) -> None:
        made = {"metadata": {"name": "s"}, "endpoints": [{"addresses": ["10.0.0.1"]}] * 1001}
        assert "1001 endpoints" in seen(made, kind="endpointslices").skipped


class TestRules:
    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("model", "field=label:KEY"),
            ("modell=label:a", "is no field"),
            ("model=tag:a", "none of label:KEY"),
            ("model=label:a b", "none of label:KEY"),
            ("model=label:a,model=label:b", "given twice"),
        ],
    )
    def test_a_faulty_rule_is_named(self, text: str, word: str) -> None:
        with pytest.raises(ValueError, match=word):
            parse_places(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "app",
            "!app",
            "a=b",
            "a==b, c!=d",
            "llm-d.ai/role in (decode, prefill)",
            "a notin (b)",
            "n>5",
            "a=",
        ],
    )
    def test_selectors_of_kubernetes_pass(self, text: str) -> None:
        assert check_selector(text) == text

    @pytest.mark.parametrize("text", ["a=b c", "=a", "a in b", "a,,b", "a=b&limit=1", "a b", "-a", "a=b\n,,"])
    def test_what_kubernetes_would_refuse_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="label selector"):
            check_selector(text)
