"""Pods, Services or EndpointSlices of a Kubernetes cluster as instances."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncGenerator, Iterable
from functools import partial

from penstock.common.model import Instance, InstanceState
from penstock.discovery.adapters.kubernetes_api import KubernetesApi, Load, credentials_of
from penstock.discovery.adapters.kubernetes_resource import Bounds, Resource, Target
from penstock.discovery.adapters.kubernetes_watch import Pace, Watch
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.kubernetes_instances import find
from penstock.discovery.kubernetes_settings import KubernetesSettings
from penstock.discovery.ports import Source, SourceState, bounded

NAME = "kubernetes"
_BEST_FIRST = (InstanceState.READY, InstanceState.DRAINING, InstanceState.UNHEALTHY)


class KubernetesSource:
    """Fulfils `ports.Source`. Every namespace has a watch of its own; together they make one state, from the
    moment on that each has listed once."""

    name = NAME

    def __init__(
        self, settings: KubernetesSettings, allowed: AllowedHosts, load: Load, bounds: Bounds | None = None
    ) -> None:
        """`load` finds the credentials."""
        self._api = KubernetesApi(load, settings.discovery_kubernetes_timeout)
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        kind, rules = settings.kubernetes_kind(), settings.kubernetes_rules()
        pace = Pace(
            settings.discovery_kubernetes_silence_sec, settings.discovery_kubernetes_refresh_interval_sec
        )
        targets = [
            Target(kind, namespace, settings.kubernetes_selector())
            for namespace in settings.kubernetes_namespaces() or ("",)
        ]
        self._watches = [
            Watch(
                Resource(
                    self._api,
                    target,
                    bounds or Bounds(),
                    timeout_s=settings.discovery_kubernetes_timeout,
                    page_size=settings.discovery_kubernetes_page_size,
                ),
                pace,
                find=partial(find, kind, rules=rules, allowed=allowed),
                changed=self._changed.set,
            )
            for target in targets
        ]

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """See `ports.Source`; after a full listing a state comes even if it is the same."""
        last, listings = None, 0
        self._tasks = [asyncio.create_task(watch.run(), name=f"{NAME} watch") for watch in self._watches]
        try:
            for task in self._tasks:
                task.add_done_callback(lambda _: self._changed.set())
            while True:
                await self._changed.wait()
                self._changed.clear()
                for task in self._tasks:
                    if task.done():
                        task.result()
                if not all(watch.listed for watch in self._watches):
                    continue
                state, listed = self._state(), sum(watch.listed for watch in self._watches)
                if state != last or listed != listings:
                    last, listings = state, listed
                    yield state
        finally:
            await self._stop()

    async def refresh(self) -> None:
        """List everything again."""
        for watch in self._watches:
            watch.refresh()

    async def close(self) -> None:
        """End the watches and close the connections."""
        await self._stop()
        await self._api.close()

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _state(self) -> SourceState:
        found = [(key, f) for watch in self._watches for key, f in watch.objects.items()]
        skipped = {key: f.skipped for key, f in found if f.skipped}
        stale = "; ".join(dict.fromkeys(watch.stale for watch in self._watches if watch.stale))
        return SourceState(distinct(i for _, f in found for i in f.instances), bounded(skipped), stale)


def distinct(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """One instance per id, in order of id.

    An endpoint may stand in two slices, while it moves between them or has addresses of both families:
    the one that takes work counts, and IPv4 before IPv6.
    """
    best: dict[str, Instance] = {}
    for instance in instances:
        held = best.get(instance.id)
        if held is None or _order(instance) < _order(held):
            best[instance.id] = instance
    return tuple(best[key] for key in sorted(best))


def _order(instance: Instance) -> tuple[int, bool, str]:
    host = instance.endpoint.host
    try:
        second_family = ipaddress.ip_address(host).version == 6
    except ValueError:
        second_family = False
    return _BEST_FIRST.index(instance.state), second_family, host


def kubernetes_source(settings: KubernetesSettings, allowed: AllowedHosts) -> Source:
    """The source that these settings describe; nothing is connected before its states are read."""
    load = credentials_of(settings.discovery_kubernetes_kubeconfig, settings.discovery_kubernetes_context)
    return KubernetesSource(settings, allowed, load)
