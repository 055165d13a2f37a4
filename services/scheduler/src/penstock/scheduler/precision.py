"""Precision: how much of what the prefix index expects on an instance its engine then finds there.

Of the answers whose engines report cached tokens, ingresses send sums: the tokens that the placements
expected, and those of them that were cached. A window holds the last WINDOW answers of one instance; its
precision is the share confirmed. What engines cached and the index did not know does not count.
"""

from __future__ import annotations

from collections import deque

# Answers a verdict is made of, and the share that it takes (issue 5).
WINDOW = 200
LEAST_PRECISION = 0.8
# A feed that lost its trust is tried again after so many answers of the instance, twice as many after each
# further loss, up to the most.
TRIAL_AFTER, TRIAL_AFTER_MOST = 200, 12_800


class Window:
    """The last WINDOW answers, in the portions they were reported in."""

    __slots__ = ("_portions", "answers", "confirmed", "expected")

    def __init__(self) -> None:
        self._portions: deque[tuple[int, int, int]] = deque()
        self.answers = self.expected = self.confirmed = 0

    def add(self, answers: int, expected: int, confirmed: int) -> None:
        """Take what was reported; portions go when WINDOW answers remain without them."""
        if answers <= 0 or expected <= 0 or confirmed < 0:
            return
        portion = answers, expected, min(confirmed, expected)
        self._portions.append(portion)
        self._count(portion, 1)
        while self.answers - self._portions[0][0] >= WINDOW:
            self._count(self._portions.popleft(), -1)

    @property
    def full(self) -> bool:
        """Whether there are answers enough for a verdict."""
        return self.answers >= WINDOW

    @property
    def precision(self) -> float:
        """The share confirmed; 1 while nothing was expected."""
        return self.confirmed / self.expected if self.expected else 1.0

    def _count(self, portion: tuple[int, int, int], sign: int) -> None:
        self.answers += sign * portion[0]
        self.expected += sign * portion[1]
        self.confirmed += sign * portion[2]


class Trust:
    """Whether a feed of one instance is used."""

    __slots__ = ("_answers", "_trial_after", "trusted", "window")

    def __init__(self) -> None:
        self.trusted = True
        self.window = Window()
        self._answers, self._trial_after = 0, TRIAL_AFTER

    def judge(self, answers: int, expected: int, confirmed: int) -> bool:
        """Take a report; True if the trust was lost by it, or given for a trial. While a feed is not used,
        every answer brings its trial nearer; on trial, a full window decides as it always does."""
        if self.trusted:
            self.window.add(answers, expected, confirmed)
            if not self.window.full or self.window.precision >= LEAST_PRECISION:
                if self.window.full:
                    self._trial_after = TRIAL_AFTER
                return False
            self.trusted, self._answers = False, 0
            return True
        self._answers += max(0, answers)
        if self._answers < self._trial_after:
            return False
        self._trial_after = min(2 * self._trial_after, TRIAL_AFTER_MOST)
        self.trusted, self.window = True, Window()
        return True
