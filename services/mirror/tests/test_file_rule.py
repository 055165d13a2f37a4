"""When a file's content becomes the live configuration."""

from __future__ import annotations

import pytest

from penstock.common.live_config import Document
from penstock.mirror.file_rule import FileRule

T1, T2, T3 = (f"2030-01-01T00:00:0{n}.000000Z" for n in (1, 2, 3))


def held(value: str, changed_at: str = T2, origin: str = "file") -> Document:
    return Document(value, 1, "mirror/x", changed_at, origin)


def reading(*contents: tuple[str, str], seen: Document | None = None) -> FileRule:
    """A rule that has read these, and looked at `seen` after the first."""
    rule = FileRule()
    for number, (value, since) in enumerate(contents):
        rule.read(value, since)
        if not number and seen is not None:
            rule.due(seen)
    return rule


def test_a_file_that_was_not_read_gives_nothing() -> None:
    assert not FileRule().due(None)
    assert not FileRule().due(held("a"))


@pytest.mark.parametrize(
    ("rule", "document", "due"),
    [
        (reading(("a", T1)), None, True),
        (reading(("a", T3)), held("a"), False),
        (reading(("b", T1)), held("a"), False),
        (reading(("b", T3)), held("a"), True),
        (reading(("b", T3)), held("a", origin="admin"), False),
        (reading(("a", T1), ("b", T1)), held("a"), True),
        (reading(("a", T1), ("a", T3), seen=held("a")), held("b"), False),
        (reading(("a", T1), ("b", T3), seen=held("a")), held("c", origin="admin"), False),
    ],
    ids=["none", "same", "older", "newer", "admin", "changed", "touched", "changed under an admin"],
)
def test_who_counts(rule: FileRule, document: Document | None, due: bool) -> None:
    assert rule.due(document) is due


def test_what_is_written_is_due_no_more_though_others_write_later() -> None:
    rule = reading(("a", T1), ("b", T1))
    assert rule.due(held("a"))
    rule.written()
    assert not rule.due(held("b"))
    assert not rule.due(held("c", T3))


def test_what_could_not_be_written_stays_due() -> None:
    rule = reading(("b", T3))
    assert rule.due(held("a"))
    assert rule.due(held("a"))


def test_a_file_from_the_future_is_the_newest_once() -> None:
    rule = reading(("b", "2999-01-01T00:00:00.000000Z"))
    assert rule.due(held("a"))
    rule.written()
    assert not rule.due(held("c", T3))
