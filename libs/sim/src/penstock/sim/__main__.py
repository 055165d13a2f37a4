"""`python -m penstock.sim`: simulated engines until SIGTERM or SIGINT."""

import asyncio
import signal
import sys
from contextlib import AsyncExitStack

import uvloop

from penstock.common.settings import exit_with_faults, load_or_exit
from penstock.sim.instance import Instance
from penstock.sim.settings import SimSettings

_PROG = "penstock sim"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after a clean stop, 2 for bad settings, an address that cannot be bound among them."""
    settings = load_or_exit(SimSettings, argv, prog=_PROG)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        faults = runner.run(serve(settings))
    if faults:
        exit_with_faults(_PROG, faults)
    return 0


async def serve(settings: SimSettings) -> list[str]:
    """Run the engines until a signal; what kept them from starting, if anything."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    instances: list[Instance] = []

    def heal() -> None:
        for one in instances:
            one.heal()

    loop.add_signal_handler(signal.SIGUSR1, heal)
    async with AsyncExitStack() as running:
        for place in range(settings.count):
            port = settings.port + place if settings.port else 0
            instance = Instance(
                settings.spec(),
                settings.profile(),
                host=settings.host,
                port=port,
                keep_alive_s=settings.keep_alive,
                kv_events=settings.kv_events_at(place),
                transfer=settings.transfer(place),
            )
            try:
                await running.enter_async_context(instance)
            except OSError as exc:
                return [f"--host {settings.host} --port {port}: cannot listen: {exc}"]
            instances.append(instance)
            print(f"listening on {instance.url}", flush=True)
        await stop.wait()
    return []


if __name__ == "__main__":
    sys.exit(main())
