#!/usr/bin/env python3
"""The scenarios of the overlays against a running gateway, with nothing but Python's standard library.

    kubectl --namespace penstock-weight port-forward service/penstock 8080 &
    deploy/k8s/scenario.py weight --url http://127.0.0.1:8080

Exit code 0 if every answer was as it should be. The integration tests run the same functions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# How far a share of a split may be off, as a part of all requests.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Answer:
    """Status, headers in lower case, and body of one answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Failed(Exception):
    """An answer was not as it should be."""


def ask(
    url: str, model: str, headers: Mapping[str, str] | None = None, path: str = "/v1/chat/completions"
) -> Answer:
    """One chat request of a few tokens."""
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
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
    for model, route in (("sim-model", "local"), ("external-model", "external-engine:8000")):
        for _ in range(requests):
            took = good(ask(url, model)).headers.get("x-penstock-route", "")
            if not took.startswith(route.split(":")[0]) and took != route:
                raise Failed(f"model {model} was served by {took!r}, not by {route!r}")
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
    "steady": steady,
}


def main() -> int:
    """Run one scenario; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway")
    arguments = parser.parse_args()
    try:
        print(dict(SCENARIOS[arguments.scenario](arguments.url)))
    except (Failed, OSError) as exc:
        print(f"{arguments.scenario}: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
