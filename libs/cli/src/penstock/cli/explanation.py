"""What is known of one request, and how people read it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from penstock.cli.terminal import plain
from penstock.common.messages import Placement, Reason, Rejection
from penstock.common.routing_events import (
    CandidateTerms,
    Explained,
    Inputs,
    OutcomeEvent,
    PlacementEvent,
    RejectionEvent,
    ViewAge,
)
from penstock.scheduler.policies.custom import PolicyFault
from penstock.scheduler.recording import BadInputs, decide_again, verdict_of

LOCAL = "local"
# Candidates that a table shows; JSON has them all.
MAX_ROWS = 40


class Story(msgspec.Struct, omit_defaults=True):
    """`decisions` by id, in order; `told` are those that a replica told itself."""

    name: str
    decisions: dict[str, Explained] = {}
    told: list[str] = []
    outcome: OutcomeEvent | None = None
    asked: str = ""

    @property
    def known(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.decisions) or self.outcome is not None

    def unknown(self) -> str:
        """Why there is nothing to tell."""
        return (
            f"nothing is known of {plain(self.name)}: {self.asked or 'no answer'}, and the routing log does "
            "not have it within --since"
        )

    def answered(self, replica: str, explained: Explained) -> None:
        """A replica told it."""
        decision = _event(explained).decision_id
        self.decisions[decision] = explained
        if decision not in self.told:
            self.told.append(decision)

    def logged(self, explained: Explained) -> None:
        """The log has it; with its inputs it is made again here."""
        event = _event(explained)
        if event.decision_id not in self.told:
            again = _again(event) if event.inputs is not None else "its inputs are not in the log"
            self.decisions[event.decision_id] = msgspec.structs.replace(explained, recomputed=again)


def _event(explained: Explained) -> PlacementEvent | RejectionEvent:
    event = explained.placement or explained.rejection
    if event is None:
        raise msgspec.ValidationError("neither a placement nor a rejection")
    return event


def _again(event: PlacementEvent | RejectionEvent) -> str:
    inputs = event.inputs
    assert isinstance(inputs, Inputs)
    if isinstance(event, RejectionEvent):
        return _verdict(inputs, Rejection(event.decision_id, Reason.NO_INSTANCE), [])
    verdict = _verdict(inputs, Placement(event.decision_id, event.instance), event.candidates)
    if inputs.prefill is None:
        return verdict
    placed = Placement(event.decision_id, event.prefill_instance)
    of_prefill = _verdict(inputs.prefill, placed, event.prefill_candidates)
    return verdict if of_prefill == verdict else f"{verdict}; prefill: {of_prefill}"


def _verdict(inputs: Inputs, outcome: Placement | Rejection, candidates: list[CandidateTerms]) -> str:
    try:
        return verdict_of(decide_again(inputs), outcome, candidates[0].score if candidates else 0.0)
    except (BadInputs, PolicyFault) as exc:
        return f"not possible here: {exc}"[:512]


def as_text(story: Story) -> str:
    """For people."""
    return "\n".join(_lines(story))


def _lines(story: Story) -> Iterator[str]:
    for number, (decision, explained) in enumerate(story.decisions.items(), 1):
        event = _event(explained)
        if number == 1:
            yield f"request {plain(event.request_id)}, model {plain(event.model)}"
        yield ""
        again = f", attempt {number}" if number > 1 else ""
        yield f"decision {plain(decision)} by {plain(event.replica)}{again}"
        if isinstance(event, PlacementEvent):
            yield from _placement(event)
        else:
            yield f"  refused: {plain(event.reason)}: {plain(event.message)}"
            if event.policy:
                yield f"  policy {plain(event.policy)}"
        if event.excluded:
            parts = (f"{count} {plain(reason)}" for reason, count in event.excluded.items())
            yield f"  excluded: {', '.join(parts)}"
        if event.view is not None:
            yield f"  view: {_age(event.view)}"
        if explained.recomputed and not (isinstance(event, PlacementEvent) and event.policy == LOCAL):
            yield f"  recomputed: {plain(explained.recomputed)}"
    yield ""
    yield _outcome(story.outcome)


def _placement(event: PlacementEvent) -> Iterator[str]:
    yield f"  policy {plain(event.policy)}{_weighted(event.weights)}"
    if event.policy == LOCAL:
        yield "  placed by the ingress itself: no scheduler answered in time"
    if event.fault:
        yield f"  the policy asked for failed: {plain(event.fault)}"
    prefill = f"prefill on {plain(event.prefill_instance)}, " if event.prefill_instance else ""
    matched = f", {event.matched_blocks} of {event.blocks} blocks matched" if event.blocks else ""
    yield f"  -> {prefill}{plain(event.instance)}{matched}, {event.prompt_tokens} prompt tokens"
    if event.candidates:
        yield from (f"  {line}" for line in _table(event.candidates))
    if event.prefill_candidates:
        yield f"  prefill{_weighted(event.prefill_weights)}:"
        yield from (f"  {line}" for line in _table(event.prefill_candidates))


def _weighted(weights: dict[str, float]) -> str:
    shown = ", ".join(f"{plain(name)} x {weight:.3g}" for name, weight in weights.items())
    return f" ({shown})" if shown else ""


def _table(candidates: list[CandidateTerms]) -> Iterator[str]:
    names = list(candidates[0].terms)
    head = ["", "candidate", "score", *map(plain, names), "in flight", "matched"]
    rows = [head]
    for number, one in enumerate(candidates[:MAX_ROWS]):
        values = [f"{one.terms.get(name, 0.0):.4f}" for name in names]
        mark = "*" if number == 0 else ""
        rows.append(
            [
                mark,
                plain(one.instance),
                f"{one.score:.4f}",
                *values,
                str(one.in_flight),
                str(one.matched_blocks),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield " ".join(cells).rstrip()
    if len(candidates) > MAX_ROWS:
        yield f"... and {len(candidates) - MAX_ROWS} more"


def _age(view: ViewAge) -> str:
    ages = {
        "registry": view.registry_ms,
        "load": view.load_ms,
        "engine status": view.engine_ms,
        "siblings' placements": view.feed_ms,
    }
    words = [f"{name} {ms:g} ms old" if ms >= 0 else f"{name} never heard" for name, ms in ages.items()]
    return ", ".join(words) + (f", {view.behind} placements missing" if view.behind else "")


def _outcome(outcome: OutcomeEvent | None) -> str:
    if outcome is None:
        return "outcome: none in the log yet"
    words = [f"outcome: {plain(outcome.outcome)}, status {outcome.status}"]
    if outcome.instance:
        words.append(f"from {plain(outcome.instance)}")
    words.append(f"{outcome.e2e_ms:.1f} ms")
    if outcome.prefill_instance:
        words.append(f"prefill on {plain(outcome.prefill_instance)} {outcome.prefill_ms:.1f} ms")
        words.append(f"decode's first token after {outcome.decode_ttft_ms:.1f} ms")
    if outcome.ttft_ms:
        words.append(f"first token after {outcome.ttft_ms:.1f} ms")
    if outcome.attempts > 1:
        words.append(f"{outcome.attempts} attempts")
    if outcome.error:
        words.append(plain(outcome.error))
    return ", ".join(words)
