"""`penstock audit verify` and `penstock audit export`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import aclosing

import msgspec

from penstock.cli.audit.export import Export
from penstock.cli.audit.reading import messages
from penstock.cli.audit.report import as_text
from penstock.cli.audit.settings import ExportSettings, VerifySettings
from penstock.cli.audit.verifying import Verdict, Verifying
from penstock.cli.bus_connection import connected
from penstock.common.bus import Bus
from penstock.common.errors import BusError
from penstock.common.settings import exit_with_faults, load_or_exit
from penstock.common.subjects import event_filter

PROG = "penstock audit"
CLEAN, GAPS, UNREAD = 0, 1, 2
USAGE = f"""usage: {PROG} verify|export [flags]

  verify  whether the log is whole; exit code 0: it is, 1: it is not, 2: it could not be read
  export  the log as JSON lines

{PROG} verify --help lists the flags of one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of them; the exit code."""
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or [""]
    logging.basicConfig(level=logging.ERROR, format=f"{PROG}: %(message)s", stream=sys.stderr)
    if command in ("-h", "--help", "help"):
        print(USAGE)
        raise SystemExit(CLEAN)
    if command.startswith("-"):
        exit_with_faults(PROG, [f"{command}: unknown flag"])
    if command not in ("verify", "export"):
        print(f"{PROG}: {f'no command {command!r}' if command else 'which one?'}\n\n{USAGE}", file=sys.stderr)
        return UNREAD
    try:
        if command == "verify":
            return asyncio.run(_verify(load_or_exit(VerifySettings, arguments, prog=f"{PROG} verify")))
        return asyncio.run(_export(load_or_exit(ExportSettings, arguments, prog=f"{PROG} export")))
    except BusError as exc:
        print(f"{PROG} {command}: the log cannot be read: {exc}", file=sys.stderr)
    except OSError as exc:
        print(f"{PROG} {command}: {exc.strerror or exc}", file=sys.stderr)
    return UNREAD


async def _verify(settings: VerifySettings) -> int:
    async with connected(settings, "audit") as bus:
        verdict = await verify(bus, settings.since, settings.settle)
    print(msgspec.json.encode(verdict).decode() if settings.json else as_text(verdict))
    return CLEAN if verdict.clean else GAPS


async def verify(bus: Bus, since: float | None, settle_s: float) -> Verdict:
    """Check the log from a moment (Unix seconds) on. Raises BusError."""
    verifying = Verifying()
    async with aclosing(messages(bus, event_filter(), since)) as stored:
        async for message in stored:
            verifying.take(message)
    return verifying.verdict(settle_s)


async def _export(settings: ExportSettings) -> int:
    if settings.resume and settings.out is None:
        print(f"{PROG} export: --resume goes on with the file of --out: give it", file=sys.stderr)
        return UNREAD
    with Export(settings.out, resume=settings.resume) as export:
        async with connected(settings, "audit") as bus:
            subject = event_filter(settings.type, settings.model)
            log = messages(bus, subject, settings.since, settings.until, export.after)
            async with aclosing(log) as stored:
                async for message in stored:
                    export.take(message)
        export.manifest()
    print(f"{PROG} export: {export.summary}", file=sys.stderr)
    return CLEAN


if __name__ == "__main__":
    sys.exit(main())
