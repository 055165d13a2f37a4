"""Numbers that are added to (JetStream's message counters, ADR-49), many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from penstock.common.adapters.nats_connection import NatsConnection
from penstock.common.adapters.nats_wire import Message
from penstock.common.errors import BusError


def add_all(
    connection: NatsConnection,
    deltas: Sequence[tuple[str, int]],
    deadline_s: float,
    settled: Callable[[Sequence[Message | BusError]], None],
) -> None:
    """Add to numbers by subject, in one piece; `settled` gets the answers in their order, BusTimeout or
    BusUnavailable in the place of a missing one, once there are all, and perhaps before this returns."""
    if not deltas:
        settled([])
        return
    answers: dict[int, Message | BusError] = {}

    def settle(index: int, result: Message | BusError) -> None:
        answers[index] = result
        if len(answers) == len(deltas):
            timer.cancel()
            settled([answers[number] for number in range(len(deltas))])

    def give_up() -> None:
        for token in tokens:
            connection.give_up(token, deadline_s)

    tokens: list[str] = []
    timer = asyncio.get_running_loop().call_later(deadline_s, give_up)
    last = len(deltas) - 1
    for index, (subject, delta) in enumerate(deltas):
        headers = {"Nats-Incr": f"{delta:+d}"}
        tokens.append(connection.expect(subject, b"", headers, partial(settle, index), flush=index == last))
