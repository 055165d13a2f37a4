#!/usr/bin/env python3
"""The scenarios of the overlays against a running gateway, with nothing but Python's standard library.

    kubectl --namespace penstock-weight port-forward service/penstock 8080 &
    deploy/k8s/scenario.py weight --url http://127.0.0.1:8080
    deploy/k8s/scenario.py fallback --namespace penstock-weight

Exit code 0 if every answer was as it should be. Those that change the cluster need --namespace and kubectl.
The integration tests run the same functions (tests/integration/test_overlays.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

# How far a share of a split may be off, as a part of all requests.
TOLERANCE = 0.1
# Pods start and end, and a kubelet brings a changed ConfigMap within a minute or so.
PATIENCE_S = 180.0
# Requests in which a copy would have been made.
UNCOPIED = 20
LONG_PROMPT = "Tell me about prefill and decode. " * 60


@dataclass(frozen=True)
class Answer:
    """Status, headers in lower case, and body of one answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Failed(Exception):
    """An answer was not as it should be."""


class Cluster(Protocol):
    """What a scenario changes where the gateway runs."""

    def scale(self, deployment: str, replicas: int) -> None:
        """Return once so many pods are wanted."""

    def write_mirror(self, config: Mapping[str, object]) -> None:
        """Give the mirror pods another /mnt/mirror.json."""

    def copies(self) -> int:
        """Requests that mirror-target has had."""


def ask(
    url: str,
    model: str,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
    prompt: str = "hello",
) -> Answer:
    """One chat request of a few tokens."""
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as exc:
        return Answer(exc.code, {k.lower(): v for k, v in exc.headers.items()}, exc.read())


def good(answer: Answer) -> Answer:
    """The same if it is a 200. Raises Failed."""
    if answer.status != 200:
        raise Failed(f"status {answer.status}: {answer.body[:300]!r}")
    return answer


def first(url: str, requests: int = 8) -> Counter[str]:
    """Requests are answered; who answered how many."""
    return Counter(good(ask(url, "sim-model")).headers.get("target-pod", "") for _ in range(requests))


def prefix(url: str, requests: int = 10) -> Counter[str]:
    """`sim-*` is served here, `external-*` by the endpoint; nobody serves anything else."""
    routes: Counter[str] = Counter()
    for model, local in (("sim-model", True), ("external-model", False)):
        for _ in range(requests):
            took = good(ask(url, model)).headers.get("x-penstock-route", "")
            if not took or (took == "local") is not local:
                raise Failed(f"model {model} was served by {took!r}")
            routes[took] += 1
    unknown = ask(url, "no-such-model")
    if unknown.status != 404:
        raise Failed(f"a model that nobody has: status {unknown.status}, not 404")
    return routes


def weight(url: str, requests: int = 200) -> Counter[str]:
    """Half of the requests each."""
    routes = Counter(good(ask(url, "sim-model")).headers.get("x-penstock-route", "") for _ in range(requests))
    if len(routes) != 2 or abs(routes["local"] / requests - 0.5) > TOLERANCE:
        raise Failed(f"{requests} requests were split {dict(routes)}")
    return routes


def owners(url: str, requests: int = 6) -> Counter[str]:
    """Each owner's requests go to its own instances, by header and by query."""
    taken: dict[str, set[str]] = {}
    for owner in ("vllm", "sglang"):
        pods = {
            good(ask(url, "sim-model", {"x-owned-by": owner})).headers["target-pod"] for _ in range(requests)
        }
        pods |= {
            good(ask(url, "sim-model", path=f"/v1/chat/completions?owned_by={owner}")).headers["target-pod"]
            for _ in range(requests)
        }
        taken[owner] = pods
    if taken["vllm"] & taken["sglang"]:
        raise Failed(f"owners share instances: {sorted(taken['vllm'] & taken['sglang'])}")
    if ask(url, "sim-model", {"x-owned-by": "nobody"}).status != 404:
        raise Failed("an owner that does not exist was served")
    return Counter({owner: len(pods) for owner, pods in taken.items()})


def pairs(url: str, requests: int = 12) -> Counter[str]:
    """Each prompt is computed by one instance and answered by another, by more than one pair."""
    taken: Counter[str] = Counter()
    for number in range(requests):
        headers = good(ask(url, "sim-model", prompt=f"{number}. {LONG_PROMPT}")).headers
        prefill, decode = headers.get("prefill-target-pod", ""), headers.get("target-pod", "")
        if not prefill or not decode or prefill == decode:
            raise Failed(f"prefill by {prefill!r}, decode by {decode!r}")
        taken[f"{prefill} -> {decode}"] += 1
    if len(taken) < 2:
        raise Failed(f"one pair had all requests: {dict(taken)}")
    return taken


def fallback(url: str, cluster: Cluster) -> Counter[str]:
    """Without the discovered engines the external one answers, and no request fails; then as before."""
    routes: Counter[str] = Counter()

    def served(local: bool) -> bool:
        took = good(ask(url, "sim-model")).headers.get("x-penstock-route", "")
        routes[took] += 1
        return (took == "local") is local

    until(lambda: served(local=True), "the local route is taken")
    cluster.scale("demo-engine", 0)
    until(lambda: all(served(local=False) for _ in range(10)), "all requests take the fallback")
    cluster.scale("demo-engine", 4)
    until(lambda: served(local=True), "the local route is taken again")
    return routes


def mirror(url: str, cluster: Cluster) -> Counter[str]:
    """Copies come while the file says so: on, off, on."""
    copies: Counter[str] = Counter()
    target = {"Target": "http://mirror-target:8000", "Ratio": 100, "Timeout": 5000}

    def copied() -> bool:
        before = cluster.copies()
        for _ in range(UNCOPIED):
            good(ask(url, "sim-model"))
        time.sleep(0.5)
        return cluster.copies() > before

    for turn, enabled in (("on", True), ("off", False), ("on again", True)):
        cluster.write_mirror({"Enable": enabled, **target})
        until(lambda wanted=enabled: copied() is wanted, f"copies come: {enabled}")  # type: ignore[misc]  # a lambda's default
        copies[turn] = cluster.copies()
    return copies


def until(check: Callable[[], bool], what: str) -> None:
    """Ask again until it is so. Raises Failed."""
    ended = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > ended:
            raise Failed(f"not within {PATIENCE_S:g} s: {what}")
        time.sleep(0.2)


class Kubectl:
    """A cluster by its command line."""

    def __init__(self, namespace: str, *, write_in_pod: bool) -> None:
        """`write_in_pod`: overlay traffic-mirror-writable; else the ConfigMap is changed."""
        self._namespace, self._write_in_pod = namespace, write_in_pod

    def scale(self, deployment: str, replicas: int) -> None:
        self._run("scale", "deployment", deployment, "--replicas", str(replicas))
        self._run("rollout", "status", f"deployment/{deployment}", "--timeout", f"{PATIENCE_S:g}s")

    def write_mirror(self, config: Mapping[str, object]) -> None:
        text = json.dumps(config)
        if self._write_in_pod:
            shell = ["sh", "-c", "cat > /mnt/mirror.json"]
            self._run(
                "exec", "--stdin", "deployment/penstock-mirror", "-c", "mirror", "--", *shell, given=text
            )
        else:
            patch = json.dumps({"data": {"mirror.json": text}})
            self._run("patch", "configmap", "penstock-mirror-config", "--type", "merge", "--patch", patch)

    def copies(self) -> int:
        ask_it = (
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/sim/state').read().decode())"
        )
        state = json.loads(self._run("exec", "deployment/mirror-target", "--", "python", "-c", ask_it))
        return int(state["requests_total"])

    def _run(self, *arguments: str, given: str = "") -> str:
        command = ["kubectl", "--namespace", self._namespace, *arguments]
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
        )
        if done.returncode:
            raise Failed(f"{' '.join(command[:5])}: {done.stderr.strip()}")
        return done.stdout


def steady(url: str, seconds: float = 60.0) -> Counter[str]:
    """Requests go on being answered, whatever is killed meanwhile."""
    ended, statuses = time.monotonic() + seconds, Counter[str]()
    while time.monotonic() < ended:
        statuses[str(good(ask(url, "sim-model")).status)] += 1
        time.sleep(0.05)
    return statuses


SCENARIOS: Mapping[str, Callable[[str], Counter[str]]] = {
    "first": first,
    "prefix": prefix,
    "weight": weight,
    "owners": owners,
    "pairs": pairs,
    "steady": steady,
}
# Those that change something in the cluster.
CHANGING: Mapping[str, Callable[[str, Cluster], Counter[str]]] = {"fallback": fallback, "mirror": mirror}


def main() -> int:
    """Run one scenario; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=[*SCENARIOS, *CHANGING])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway")
    parser.add_argument("--namespace", default="", help="where it runs, for kubectl")
    parser.add_argument(
        "--write-in-pod", action="store_true", help="of mirror: in the overlay traffic-mirror-writable"
    )
    arguments = parser.parse_args()
    changing = CHANGING.get(arguments.scenario)
    if changing is not None and not arguments.namespace:
        parser.error(f"{arguments.scenario} needs --namespace")
    try:
        if changing is not None:
            told = changing(arguments.url, Kubectl(arguments.namespace, write_in_pod=arguments.write_in_pod))
        else:
            told = SCENARIOS[arguments.scenario](arguments.url)
        print(dict(told))
    except (Failed, OSError) as exc:
        print(f"{arguments.scenario}: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
