"""`python -m penstock.scheduler`: one scheduler replica."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.machine_code import folder_of, use


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; the exit code. What has been compiled runs as machine code."""
    use(folder_of("penstock.scheduler"))
    # Not before they are looked for in the right place.
    from penstock.scheduler.process import main as run

    return run(argv)


if __name__ == "__main__":
    raise SystemExit(main())
