"""`penstock up`: the whole stack on one machine, supervised, with one log."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import aiohttp

from penstock.cli.data_folder import FolderInUse, data_folder
from penstock.cli.log_lines import Record, as_json, as_text, from_json, from_nats
from penstock.cli.plan import Plan, make_plan, start_faults
from penstock.cli.processes import Child, Supervisor
from penstock.cli.ready import Check, NotReady, engines_missing, models_served, service_missing, until_ready
from penstock.cli.screen import Screen
from penstock.cli.terminal import wants_colour
from penstock.cli.up_settings import PROG, UpFlags, UpSettings, read_settings
from penstock.common.machine_code import folder_of, missing
from penstock.common.settings import SettingsError, exit_with_faults, unknown_variables
from penstock.discovery.settings import ENDPOINTS

STOP_MARGIN_S = 2.0
SCREEN_CLOSE_S = 2.0
# A child that died this often before the stack was ready will not become well.
MAX_DEATHS = 5
BAD_SETTINGS = 2


class StartFailed(Exception):
    """The stack cannot become ready; says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stack until SIGINT or SIGTERM. Exit codes: 0 clean stop, 1 it did not start, 2 bad settings."""
    try:
        settings = read_settings(argv)
    except SettingsError as exc:
        exit_with_faults(PROG, exc.faults)
    faults = start_faults(settings)
    if faults:
        exit_with_faults(PROG, faults)
    try:
        return asyncio.run(Stack(settings).run())
    except FolderInUse as exc:
        exit_with_faults(PROG, [str(exc)])


class Stack:
    """One run of everything."""

    def __init__(self, settings: UpSettings) -> None:
        self._settings = settings
        self._colour = wants_colour(sys.stdout)
        self._supervisor = Supervisor(self._on_line, self._on_death)
        self._started_at = time.monotonic()

    async def run(self) -> int:
        """From nothing to nothing; the exit code."""
        self._loop = loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup the stack outlives its terminal.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal)
        self._screen = Screen(sys.stdout.fileno(), self._on_nobody_reads)
        try:
            with data_folder(self._settings.data_dir) as folder:
                return await self._run(folder)
        finally:
            self._screen.close(SCREEN_CLOSE_S)

    async def _run(self, folder: Path) -> int:
        for name in unknown_variables([UpFlags]):
            self._say(f"environment variable {name} is not a setting", "warning")
        plan = make_plan(self._settings, folder, os.environ)
        start = asyncio.create_task(self._start(plan), name="start")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                self._welcome(plan, start.result())
                await self._supervisor.watch(self._stopping)
            return 0
        except StartFailed as exc:
            self._say(str(exc), "error")
            return 1
        except NotReady as exc:
            self._say(f"not ready after {self._settings.start_timeout:g} s, this is missing:", "error")
            for name, text in exc.missing.items():
                self._say(f"{name}: {text}", "error")
            return 1
        finally:
            start.cancel()
            stop.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)
            await self._stop()

    async def _start(self, plan: Plan) -> str:
        """Bring everything up; the name of a model that is served, empty if engines are still to register."""
        async with aiohttp.ClientSession() as session:
            if plan.nats and plan.nats_command:
                plan.nats.write_config()
                self._supervisor.start(plan.nats_command)
                await self._ready({"nats": plan.nats.missing})
            if plan.listing is not None:
                plan.listing.write()
            for command in plan.sim_commands:
                self._supervisor.start(command)
            for member in plan.members:
                self._supervisor.start(member.command)
            served: list[str] = []
            await self._ready(self._checks(plan, session, served))
            return served[0] if served else ""

    def _checks(self, plan: Plan, session: aiohttp.ClientSession, served: list[str]) -> dict[str, Check]:
        """What is asked of each part; the names of models go to `served`."""

        async def models_missing() -> str:
            served[:] = await models_served(session, plan.base_url)
            return "" if served else f"{plan.base_url}/v1/models lists none: no engine is known to be ready"

        checks: dict[str, Check] = {
            member.command.name: partial(service_missing, session, member.admin_url)
            for member in plan.members
        }
        if plan.engine_urls:
            name = f"engines ({len(plan.engine_urls)})"
            checks[name] = partial(engines_missing, session, plan.engine_urls)
        if ENDPOINTS not in self._settings.sources:
            # Engines that register may come at any time later.
            return checks
        return checks | {"models": models_missing}

    async def _ready(self, checks: dict[str, Check]) -> None:
        left_s = self._settings.start_timeout - self._elapsed_s()
        await until_ready(
            checks,
            lambda name: self._say(f"{name} ready ({self._elapsed_s():.1f} s)"),
            self._still_possible,
            left_s,
        )

    def _still_possible(self) -> None:
        self._supervisor.check()
        for child in self._supervisor.children:
            if child.exit_code == BAD_SETTINGS and child.deaths:
                raise StartFailed(f"{child.command.name} refused its settings, see above")
            if child.deaths >= MAX_DEATHS:
                raise StartFailed(f"{child.command.name} ended {child.deaths} times, see above")

    async def _stop(self) -> None:
        """The ingress first, while all that it needs still runs; the bus last."""
        grace_s = self._settings.drain_timeout + STOP_MARGIN_S
        self._say("stopping")
        children = self._supervisor.children
        ingress = [child for child in children if child.command.name == "ingress"]
        nats = [child for child in children if child.command.name == "nats"]
        others = [child for child in children if child not in ingress and child not in nats]
        for stage in (ingress, others, nats):
            for late in await self._supervisor.stop(stage, grace_s):
                self._say(f"{late.command.name} did not stop within {grace_s:g} s and was killed", "warning")
        self._say("stopped")

    def _on_nobody_reads(self) -> None:
        """From the screen's thread: `penstock up | head` ends as a program that writes to a pipe does."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._supervisor.kill()
        self._stopping.set()

    def _on_death(self, child: Child, cause: str, delay_s: float) -> None:
        self._say(f"{child.command.name} {cause}; starting it again in {delay_s:g} s", "warning")

    def _on_line(self, child: Child, raw: bytes) -> None:
        name, now = child.command.name, datetime.now().astimezone()
        record = from_nats(name, raw, now) if name == "nats" else from_json(name, raw, now)
        if record is None:
            return
        if self._settings.log_json and raw.startswith(b"{"):
            self._screen.write(raw.decode("utf-8", "replace"))
        else:
            self._show(record)

    def _say(self, message: str, level: str = "info", **fields: object) -> None:
        self._show(Record(datetime.now().astimezone(), "up", message, level, fields))

    def _show(self, record: Record) -> None:
        self._screen.write(as_json(record) if self._settings.log_json else as_text(record, self._colour))

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def _welcome(self, plan: Plan, model: str) -> None:
        not_compiled = missing(folder_of("penstock.ingress"))
        if self._settings.log_json:
            self._say(
                "ready",
                url=plan.base_url,
                admin_url=plan.ingress.admin_url,
                nats_url=plan.nats_url,
                auditor_url=plan.auditor_url,
                register_url=plan.register_url,
                model=model,
                engines=list(plan.engine_urls),
                machine_code=not not_compiled,
            )
        else:
            self._screen.write(
                welcome(plan, model, self._elapsed_s(), missing(folder_of("penstock.ingress")))
            )


def welcome(plan: Plan, model: str, elapsed_s: float, not_compiled: str = "") -> str:
    """What a person needs to use the stack; `not_compiled` says why the ingress runs as Python."""
    chat = json.dumps({"model": model or "MODEL", "messages": [{"role": "user", "content": "Hello"}]})
    curl = f"curl {plan.base_url}/v1/chat/completions -H 'content-type: application/json'"
    lines = [
        f"  base URL  {plan.base_url}/v1",
        f"  curl      {curl} -d {shlex.quote(chat)}",
        f'  Python    OpenAI(base_url="{plan.base_url}/v1", api_key="none")',
        f"  metrics   {plan.ingress.admin_url}/metrics",
        f"  bus       {plan.nats_url}  (for further services: --nats-url)",
        f"  events    penstock tap --nats-url {shlex.quote(plan.auditor_url)}",
    ]
    if plan.register_url:
        url = shlex.quote(plan.register_url)
        lines.append(f"  engines   penstock register --store nats --nats-url {url} --engine HOST:PORT")
    runs = f"as Python: {not_compiled} (`make compile`)" if not_compiled else "as machine code"
    lines.append(f"  ingress   runs {runs}")
    text = "\n".join(lines)
    return f"\nPenstock is ready ({elapsed_s:.1f} s).\n\n{text}\n\nCtrl-C stops everything.\n"


if __name__ == "__main__":
    sys.exit(main())
