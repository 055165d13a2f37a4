"""The `penstock` command: one word picks what runs, and only that is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    "up": ("penstock.cli.up", "the whole stack on this machine"),
    "ingress": ("penstock.ingress.__main__", "HTTP in, placements from the bus, tokens out"),
    "scheduler": ("penstock.scheduler.__main__", "which instance serves each request"),
    "discovery": ("penstock.discovery.__main__", "engine instances become registry records"),
    "mirror": ("penstock.mirror.__main__", "sampled copies of requests, replayed to a shadow"),
    "register": ("penstock.discovery.register.__main__", "beside engines: keeps them registered"),
    "sim": ("penstock.sim.__main__", "simulated engines with an OpenAI-compatible API"),
    "tap": ("penstock.cli.tap", "follow the routing events"),
    "top": ("penstock.cli.top.__main__", "live view of instances, load, prefix matches, decisions"),
    "audit": ("penstock.cli.audit.__main__", "whether the routing log is whole; the log as a file"),
    "explain": ("penstock.cli.explain", "why a request went where it went"),
    "replay": ("penstock.cli.replay.__main__", "a trace under several policies, on simulated engines"),
}


def usage() -> str:
    """What `penstock --help` prints."""
    rows = (f"  penstock {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return "\n".join(
        ["usage: penstock COMMAND [flags]", "", *rows, "", "penstock COMMAND --help lists the flags of one."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code (2: there is no such command)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command in ("-V", "--version", "version"):
        print(f"penstock {version('penstock-cli')}")
        return 0
    if command not in COMMANDS:
        complaint = f"no command named {command!r}" if command else "which command?"
        print(f"penstock: {complaint}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[command][0])
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
