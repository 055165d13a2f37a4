"""Two halves make a comparison, whichever comes first; what waits is bounded."""

from __future__ import annotations

from penstock.common.messages import MirrorCopy, MirrorPrimary
from penstock.common.routing_events import ResponseFigures
from penstock.mirror.comparison import Comparisons

SHADOW = ResponseFigures(200, 1.0, 2.0, 30, 4, "stop")
PRIMARY = ResponseFigures(503, 5.0, 6.0, 70, 8, "length")


def copy(name: str) -> MirrorCopy:
    return MirrorCopy(name, f"r-{name}", "m", b"POST", b"/", b"", b"prompt")


def primary(name: str) -> MirrorPrimary:
    return MirrorPrimary(name, 503, 5.0, 6.0, 70, 8, "length")


def test_both_orders_give_the_same() -> None:
    one, other = Comparisons(), Comparisons()
    assert one.primary(primary("a")) is None
    first = one.shadow(copy("a"), SHADOW)
    assert other.shadow(copy("a"), SHADOW) is None
    second = other.primary(primary("a"))
    assert first == second
    assert first is not None
    assert (first.copy_id, first.request_id, first.primary, first.shadow) == ("a", "r-a", PRIMARY, SHADOW)


def test_each_is_compared_once() -> None:
    waiting = Comparisons()
    waiting.primary(primary("a"))
    assert waiting.shadow(copy("a"), SHADOW) is not None
    assert waiting.shadow(copy("a"), SHADOW) is None
    assert waiting.primary(primary("b")) is None


def test_the_oldest_leave_and_shadows_among_them_are_counted() -> None:
    waiting = Comparisons(max_waiting=2)
    for name in "abc":
        waiting.primary(primary(name))
    assert waiting.shadow(copy("a"), SHADOW) is None
    assert waiting.shadow(copy("b"), SHADOW) is not None
    for name in "de":
        waiting.shadow(copy(name), SHADOW)
    assert waiting.given_up == 1
    assert waiting.primary(primary("a")) is None
    assert waiting.primary(primary("e")) is not None
