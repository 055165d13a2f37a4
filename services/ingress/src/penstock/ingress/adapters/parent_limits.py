"""Counts of rate limits in the ingress's parent, for all of its workers: `--limits-store memory`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from penstock.ingress.limits import Correction, LocalCounts, Part, Parts, Verdict
from penstock.ingress.ports import StoreLost
from penstock.ingress.tasked_store import TaskedStore

ANSWER_WITHIN_S = 1.0


class CountCall(msgspec.Struct, frozen=True, tag="count_call"):
    """One call of `LimitStore.settle` on its way to the parent."""

    number: int
    claims: list[list[Part]]
    corrections: list[Correction]


class CountReply(msgspec.Struct, frozen=True, tag="count_reply"):
    """Its answer on the way back."""

    number: int
    verdicts: list[Verdict]


class ParentCounts:
    """The parent's end."""

    def __init__(self, wall: Callable[[], float]) -> None:
        """`wall`: seconds since 1970."""
        self._counts, self._wall = LocalCounts(), wall

    def answer(self, call: CountCall) -> CountReply:
        """Count."""
        now = self._wall()
        self._counts.correct(call.corrections, now)
        return CountReply(call.number, [self._counts.claim(parts, now) for parts in call.claims])


class ParentLimitStore(TaskedStore):
    """A worker's end."""

    def __init__(self, send: Callable[[CountCall], Awaitable[None]]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[list[Verdict]]] = {}

    async def ask(self, claims: Sequence[Parts], corrections: Sequence[Correction]) -> list[Verdict]:
        """As of `TaskedStore`."""
        call = CountCall(next(self._numbers), [list(parts) for parts in claims], list(corrections))
        answer: asyncio.Future[list[Verdict]] = asyncio.get_running_loop().create_future()
        self._waiting[call.number] = answer
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await self._send(call)
                return await answer
        except TimeoutError:
            raise StoreLost(f"the parent did not answer within {ANSWER_WITHIN_S:g} s") from None
        except OSError as exc:
            raise StoreLost("the parent is gone") from exc
        finally:
            del self._waiting[call.number]

    def answered(self, reply: CountReply) -> None:
        """The parent answered."""
        answer = self._waiting.get(reply.number)
        if answer is not None and not answer.done():
            answer.set_result(reply.verdicts)
