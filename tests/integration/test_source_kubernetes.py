"""The Kubernetes source beside an API that lists and watches as Kubernetes does."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from integration.kubernetes_lab import KubernetesLab, kubeconfig, service_account, source_of
from integration.kubernetes_objects_made import endpoint, endpoint_slice, pod, service
from integration.kubernetes_stub import KubernetesStub
from integration.servers import eventually
from integration.source_contract import Reader, SourceContract, instance
from penstock.common.model import InstanceState
from penstock.discovery.adapters.kubernetes_resource import Bounds

pytestmark = pytest.mark.integration


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[KubernetesLab]:
    made = KubernetesLab(tmp_path)
    await made.stub.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def reading(lab: KubernetesLab, **changed: Any) -> AsyncIterator[Reader]:
    """A source with these flags, and its reader."""

    class Flagged:
        def source(self) -> Any:
            return lab.source(**changed)

        def id_of(self, name: str) -> str:
            return lab.id_of(name)

    reader = Reader(Flagged())  # type: ignore[arg-type]  # what a reader uses of a lab
    try:
        yield reader
    finally:
        await reader.close()


class TestKubernetes(SourceContract):
    """The contract of all sources."""


class TestListing:
    async def test_it_is_read_page_by_page(self, lab: KubernetesLab) -> None:
        await lab.put(*(instance(f"i{n}") for n in range(7)))
        async with reading(lab, page_size=3) as reader:
            await reader.until(*(f"i{n}" for n in range(7)))
        assert [(q["limit"], "continue" in q) for q in lab.stub.asked("list")] == [
            ("3", False),
            ("3", True),
            ("3", True),
        ]

    async def test_a_continue_token_that_expires_starts_it_over(self, lab: KubernetesLab) -> None:
        await lab.put(*(instance(f"i{n}") for n in range(7)))
        lab.stub.faults.expired_pages = 1
        async with reading(lab, page_size=3) as reader:
            await reader.until(*(f"i{n}" for n in range(7)))
            assert all(len(state.instances) == 7 for state in reader.states)

    async def test_one_that_is_no_json_of_the_api_leaves_the_last_list(self, lab: KubernetesLab) -> None:
        await lab.put(instance("a"))
        async with reading(lab) as reader:
            await reader.until("a")
            for body in (b"<html>", b'{"metadata": {}, "items": 5}', b"[" * 100_000):
                lab.stub.faults.body = body
                await reader.source.refresh()
                await reader.until_stale(True)
                assert reader.lists("a")
                lab.stub.faults.body = b""
                await reader.until_stale(False)

    async def test_a_page_over_the_bound_is_asked_for_in_smaller_pieces(self, lab: KubernetesLab) -> None:
        lab.bounds = Bounds(page_bytes=5000)
        await lab.put(*(instance(f"i{n}") for n in range(20)))
        async with reading(lab, page_size=16) as reader:
            await reader.until(*(f"i{n}" for n in range(20)))
        assert {"16", "4"} <= {query["limit"] for query in lab.stub.asked("list")}

    async def test_more_objects_than_the_bound_leave_the_last_list(self, lab: KubernetesLab) -> None:
        lab.bounds = Bounds(objects=3)
        await lab.put(instance("a"), instance("b"), instance("c"))
        async with reading(lab) as reader:
            await reader.until("a", "b", "c")
            await lab.put(instance("d"))
            await eventually(lambda: "narrow" in reader.last.stale)
            await lab.delete("a")
            await reader.until("b", "c", "d")
            await reader.until_stale(False)

    async def test_objects_whose_metadata_cannot_be_read_harm_no_other(self, lab: KubernetesLab) -> None:
        good = {**pod("a", ports={"http": 1}), "x": 1}
        page = {"metadata": {"resourceVersion": "100"}, "items": [5, {"metadata": []}, good]}
        lab.stub.faults.body = json.dumps(page).encode()
        async with reading(lab) as reader:
            await reader.until("a")
            assert "metadata" in reader.last.skipped["pods/?"]


class TestWatch:
    async def test_a_watch_goes_on_from_the_last_version_after_it_ended(self, lab: KubernetesLab) -> None:
        async with reading(lab) as reader:
            await reader.until()
            for names in ("a", "ab", "abc"):
                await lab.put(instance(names[-1]))
                await reader.until(*names)
                await lab.stub.cut()
            await lab.put(instance("d"))
            await reader.until("a", "b", "c", "d")
        assert len(lab.stub.asked("list")) == 1
        assert not any(state.stale for state in reader.states)

    @pytest.mark.parametrize("as_status", [False, True])
    async def test_a_version_that_expired_means_a_new_listing(
        self, lab: KubernetesLab, as_status: bool
    ) -> None:
        lab.stub.faults.gone_as_status = as_status
        await lab.put(instance("a"))
        async with reading(lab) as reader:
            await reader.until("a")
            await lab.stub.stop()
            await lab.stub.delete("pods", "a")
            await lab.put(instance("b"))
            await lab.stub.compact()
            await lab.stub.start()
            await reader.until("b")
            await reader.until_stale(False)
        assert len(lab.stub.asked("list")) == 2

    async def test_bookmarks_move_the_version_so_that_nothing_expires(self, lab: KubernetesLab) -> None:
        lab.stub.bookmark_s = 0.02
        async with reading(lab) as reader:
            await reader.until()
            # Somebody else's objects: the watch has no event of these.
            await lab.stub.put("services", service("s"))
            await eventually(lambda: lab.stub.bookmarks[-1:] == [101])
            await lab.stub.compact()
            await lab.stub.cut()
            await lab.put(instance("a"))
            await reader.until("a")
        assert len(lab.stub.asked("list")) == 1

    async def test_a_silent_watch_is_opened_anew_and_misses_nothing(self, lab: KubernetesLab) -> None:
        async with reading(lab, silence_sec=0.1) as reader:
            await reader.until()
            lab.stub.faults.silent = True
            await lab.put(instance("a"))
            watches = len(lab.stub.asked("watch"))
            await eventually(lambda: len(lab.stub.asked("watch")) > watches + 4)
            assert reader.lists()
            lab.stub.faults.silent = False
            await reader.until("a")
        assert len(lab.stub.asked("list")) == 1

    async def test_a_frozen_api_is_noticed_though_its_connections_stand(self, lab: KubernetesLab) -> None:
        await lab.put(instance("a"))
        async with reading(lab, silence_sec=0.1, timeout=0.2) as reader:
            await reader.until("a")
            lab.stub.faults.frozen = True
            await eventually(lambda: "does not answer within 0.2 s" in reader.last.stale)
            assert reader.lists("a")

    @pytest.mark.parametrize(
        "line",
        [
            b'{"type": "MODIFIED", "object": {"metadata": {"name": "a", "na',
            b"not json\n",
            b'{"type": "ADDED", "object": 5}\n',
            b'{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd"}}\n',
            b'{"type": "ADDED"}\n{"type": "ADDED", "object": ' + b"[" * 100_000 + b"\n",
            b"x" * 200_000,
        ],
        ids=["half a line", "no json", "no object", "error 500", "too deep", "too long"],
    )
    async def test_a_stream_gone_wrong_is_left_for_another(self, lab: KubernetesLab, line: bytes) -> None:
        lab.bounds = Bounds(line_bytes=150_000)
        await lab.put(instance("a"))
        lab.stub.faults.lines = [line, line]
        async with reading(lab, silence_sec=0.1) as reader:
            await reader.until("a")
            await lab.put(instance("b"))
            await reader.until("a", "b")
            await reader.until_stale(False)
        assert not lab.stub.faults.lines

    async def test_a_stream_that_never_gets_a_line_across_ends_in_a_listing(self, lab: KubernetesLab) -> None:
        lab.stub.faults.lines = [b'{"type": "ADDED", "obj'] * 50
        async with reading(lab, silence_sec=0.1) as reader:
            await reader.until()
            await lab.put(instance("a"))
            await reader.until("a")
        assert lab.stub.faults.lines

    async def test_watches_that_end_at_once_end_in_a_listing_and_heal(self, lab: KubernetesLab) -> None:
        lab.stub.faults.end_at_once = True
        async with reading(lab) as reader:
            await eventually(lambda: len(lab.stub.asked("list")) > 1)
            lab.stub.faults.end_at_once = False
            await lab.put(instance("a"))
            await reader.until("a")

    async def test_a_pod_drains_while_it_terminates_and_then_is_gone(self, lab: KubernetesLab) -> None:
        await lab.stub.put("pods", pod("a", ports={"http": 1}))
        async with reading(lab) as reader:
            await reader.until("a")
            ending = pod("a", ports={"http": 1}, deletionTimestamp="2026-01-01T00:00:30Z", ready=False)
            await lab.stub.put("pods", ending)
            await eventually(lambda: reader.find("a").state is InstanceState.DRAINING)
            await lab.stub.delete("pods", "a")
            await reader.until()

    async def test_a_pod_that_loses_its_label_is_gone(self, lab: KubernetesLab) -> None:
        await lab.stub.put("pods", pod("a", ports={"http": 1}, labels={"app": "x"}))
        async with reading(lab, selector="app=x") as reader:
            await reader.until("a")
            await lab.stub.put("pods", pod("a", ports={"http": 1}, labels={"app": "y"}))
            await reader.until()

    async def test_the_full_listing_comes_though_the_watch_is_well(self, lab: KubernetesLab) -> None:
        async with reading(lab, refresh_interval_sec=0.4, silence_sec=0.1) as reader:
            await eventually(lambda: len(lab.stub.asked("list")) > 2)
            assert not reader.last.stale


class TestRefusals:
    @pytest.mark.parametrize("verb", ["list", "watch"])
    async def test_a_missing_right_is_named(self, lab: KubernetesLab, verb: str) -> None:
        await lab.put(instance("a"))
        async with reading(lab) as reader:
            await reader.until("a")
            lab.stub.faults.forbidden = {(verb, "pods")}
            await lab.stub.cut()
            await reader.source.refresh()
            await eventually(lambda: f"may not {verb} pods in namespace default" in reader.last.stale)
            assert reader.lists("a")
            lab.stub.faults.forbidden = set()
            await reader.until_stale(False)

    async def test_a_missing_right_at_the_start_is_logged(
        self, lab: KubernetesLab, caplog: pytest.LogCaptureFixture
    ) -> None:
        lab.stub.faults.forbidden = {("list", "pods")}
        async with reading(lab) as reader:
            await eventually(lambda: "may not list pods in namespace default" in caplog.text)
            assert reader.states == []

    async def test_an_api_that_asks_for_patience_gets_it(self, lab: KubernetesLab) -> None:
        await lab.put(instance("a"))
        lab.stub.faults.status, lab.stub.faults.retry_after = 429, "1"
        async with reading(lab) as reader:
            await eventually(lambda: lab.stub.requests)
            lab.stub.faults.status = 0
            await reader.until("a")
        assert len(lab.stub.asked("list")) == 2


class TestCredentials:
    async def test_a_service_account_is_used_over_tls_and_its_token_may_rotate(self, tmp_path: Path) -> None:
        authority = trustme.CA()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        stub = KubernetesStub(token="first", tls=tls)
        load = service_account(
            tmp_path, stub, token="first", ca=authority.cert_pem.bytes(), namespace="serving"
        )
        await stub.start()
        await stub.put("pods", pod("a", ports={"http": 1}, namespace="serving"))

        class Mounted:
            def source(self) -> Any:
                return source_of(load, namespace="")

            def id_of(self, name: str) -> str:
                return f"{name}.serving"

        reader = Reader(Mounted())  # type: ignore[arg-type]  # what a reader uses of a lab
        try:
            await reader.until("a")
            stub.token = "second"
            (tmp_path / "token").write_text("second\n")
            await stub.cut()
            await stub.put("pods", pod("b", ports={"http": 1}, namespace="serving"))
            await reader.until("a", "b")
            assert not any(state.stale for state in reader.states), "a rotated token is no outage"
            stub.token = "third"
            await stub.cut()
            await eventually(lambda: "401" in reader.last.stale)
            assert reader.lists("a", "b")
            assert "second" not in reader.last.stale
        finally:
            await reader.close()
            await stub.stop()

    async def test_a_certificate_of_somebody_else_is_refused(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
        stub = KubernetesStub(tls=tls)
        other = trustme.CA().cert_pem.bytes()
        load = service_account(tmp_path, stub, token="t", ca=other, namespace="n")
        await stub.start()

        class Mounted:
            def source(self) -> Any:
                return source_of(load)

        reader = Reader(Mounted())  # type: ignore[arg-type]  # what a reader uses of a lab
        try:
            await eventually(lambda: "certificate is not trusted" in caplog.text)
            assert not stub.requests
        finally:
            await reader.close()
            await stub.stop()

    async def test_a_kubeconfig_that_says_nothing_of_use_is_told_without_its_secrets(
        self, lab: KubernetesLab, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = lab.folder / "broken"
        for text in ("token: geheim\nclusters: 5", "geheim", "geheim: [", '{"current-context": "geheim"}'):
            path.write_text(text)
            caplog.clear()
            reader = Reader(_With(lab, path))  # type: ignore[arg-type]  # what a reader uses of a lab
            await eventually(lambda: "no credentials" in caplog.text)
            await reader.close()
        assert not lab.stub.requests

    async def test_the_context_chooses_user_and_namespace(self, lab: KubernetesLab) -> None:
        await lab.stub.put(
            "pods", pod("a", ports={"http": 1}), pod("b", ports={"http": 1}, namespace="there")
        )
        async with reading(lab, namespace="") as reader:
            await eventually(lambda: {*reader.listed} == {"a.default"})
        async with reading(lab, namespace="", context="there") as reader:
            await eventually(lambda: {*reader.listed} == {"b.there"})


class _With:
    """A lab that reads another kubeconfig."""

    def __init__(self, lab: KubernetesLab, path: Path) -> None:
        self._lab, self._path = lab, path

    def source(self) -> Any:
        return self._lab.source_with(self._path)


class TestFlags:
    """Those whose effect no test above shows."""

    async def test_namespace_lists_several_or_all(self, lab: KubernetesLab) -> None:
        for namespace in ("one", "two", "three"):
            await lab.stub.put("pods", pod("a", ports={"http": 1}, namespace=namespace))
        async with reading(lab, namespace="one, two") as reader:
            await eventually(lambda: {*reader.listed} == {"a.one", "a.two"})
            assert all(len(state.instances) == 2 for state in reader.states), "one namespace is not the fleet"
        async with reading(lab, namespace="*") as reader:
            await eventually(lambda: {*reader.listed} == {"a.one", "a.two", "a.three"})

    @pytest.mark.parametrize(
        ("preset", "kind", "labels"),
        [
            ("none", "pods", {"penstock/discover": "true"}),
            ("aibrix", "pods", {"model.aibrix.ai/name": "m"}),
            ("llm-d", "services", {"llm-d.ai/role": "decode"}),
        ],
    )
    async def test_preset_says_what_is_watched(
        self, lab: KubernetesLab, preset: str, kind: str, labels: dict[str, str]
    ) -> None:
        for name, worn in (("a", labels), ("b", {})):
            made = service(name) if kind == "services" else pod(name, ports={"http": 1})
            made["metadata"]["labels"] = worn
            await lab.stub.put(kind, made)
        async with reading(lab, preset=preset, selector="") as reader:
            await reader.until("a")
        assert {query["kind"] for query in lab.stub.requests} == {kind}

    async def test_kind_watches_slices_and_an_endpoint_in_two_of_them_counts_once(
        self, lab: KubernetesLab
    ) -> None:
        await lab.stub.put(
            "endpointslices",
            endpoint_slice("s-6", endpoint("fd00::1", "a"), endpoint("fd00::2", "b")),
            endpoint_slice("s-4", endpoint("10.0.0.1", "a"), endpoint("10.0.0.2", "b", ready=False)),
        )
        async with reading(lab, kind="endpointslices") as reader:
            await reader.until("a", "b")
            assert reader.find("a").endpoint.host == "10.0.0.1"
            assert reader.find("b").endpoint.host == "fd00::2", "the one that takes work"

    async def test_port_and_map_say_how_objects_are_read(self, lab: KubernetesLab) -> None:
        await lab.stub.put("pods", pod("a", ports={"x": 1, "y": 2}, labels={"team": "blue"}))
        async with reading(lab, port="y", map="owner=label:team") as reader:
            await reader.until("a")
            assert (reader.find("a").endpoint.port, reader.find("a").owner) == (2, "blue")


async def test_a_kubeconfig_without_a_user_is_enough_for_an_open_api(tmp_path: Path) -> None:
    stub = KubernetesStub()
    await stub.start()
    lab = KubernetesLab(tmp_path)
    path = kubeconfig(tmp_path, stub.url)
    await stub.put("pods", pod("a", ports={"http": 1}))
    reader = Reader(_With(lab, path))  # type: ignore[arg-type]  # what a reader uses of a lab
    try:
        await eventually(lambda: {*reader.listed} == {"a.default"})
    finally:
        await reader.close()
        await stub.stop()
