"""What an audit has found, for people."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.cli.audit.chains import Fault
from penstock.cli.audit.verifying import Verdict
from penstock.cli.terminal import plain

SHOWN_FAULTS = 100


def as_text(verdict: Verdict) -> str:
    """The verdict on some lines."""
    return "\n".join(map(plain, _lines(verdict)))


def _lines(verdict: Verdict) -> Iterator[str]:
    v = verdict
    if v.messages:
        begins = "the stream's first message" if v.whole else v.since
        counts = f"{v.messages:,} messages, {v.events:,} events of {v.writers:,} writers"
        yield f"log       {counts}, {begins} to {v.until}"
        asked = f"{v.admitted:,} admitted, " if v.admitted else ""
        lost = f", {v.lost:,} lost" if v.lost else ""
        lost += f", {v.superseded:,} told lost that ended otherwise" if v.superseded else ""
        yield f"requests  {asked}{v.decided:,} decisions, {v.finished:,} outcomes{lost}, {v.open:,} open"
    if v.repeated:
        yield f"repeated  {v.repeated:,} messages are stored more than once, under the same ids"
    yield from (f"note      {note}" for note in v.notes)
    for fault in v.faults[:SHOWN_FAULTS]:
        yield from _fault(fault)
    if more := max(0, len(v.faults) - SHOWN_FAULTS) + v.more_faults:
        yield f"          and {more:,} more"
    yield "clean" if v.clean else f"NOT WHOLE: {len(v.faults) + v.more_faults:,} faults"


def _fault(fault: Fault) -> Iterator[str]:
    what = "decisions" if fault.kind in ("unfinished", "undecided", "twice") else "events"
    if what == "decisions" and fault.incarnation:
        range_ = f"{fault.incarnation}.{fault.first:x}-{fault.incarnation}.{fault.last:x}"
    else:
        range_ = f"{fault.first}-{fault.last}" if fault.last else f"from {fault.first} on"
    who = f"{fault.writer} run {fault.incarnation}".removesuffix(" run ") or "nobody"
    count = f" ({fault.count:,})" if fault.count else ""
    yield f"{fault.kind:<9} {who}, {what} {range_}{count}: {fault.cause}"
    if fault.ids:
        yield f"          {', '.join(fault.ids)}{', ...' if fault.count > len(fault.ids) else ''}"
