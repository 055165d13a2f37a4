"""The generated tables are complete, and --check finds what differs."""

from functools import cache
from pathlib import Path

import pytest

from penstock.cli.docs import RECORDS, TABLES, main, pages
from penstock.cli.up_settings import SERVICES
from penstock.common import routing_events, subjects
from penstock.common.settings import describe

TREE = Path(__file__).resolve().parents[3]
# Writing them takes seconds.
written = cache(pages)


def test_the_committed_tables_are_in_step_with_the_code() -> None:
    assert main(["--check", "--folder", str(TREE)]) == 0


def test_check_names_the_files_that_differ_and_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", str(tmp_path)]) == 0
    assert main(["--folder", str(tmp_path), "--check"]) == 0
    (tmp_path / TABLES / "bus.md").write_text("something else")
    (tmp_path / TABLES / "flags.md").unlink()
    assert main(["--folder", str(tmp_path), "--check"]) == 1
    errors = capsys.readouterr().err
    assert "bus.md" in errors
    assert "flags.md" in errors
    assert "events.md" not in errors
    assert (tmp_path / TABLES / "bus.md").read_text() == "something else"


def test_every_flag_of_every_service_is_listed() -> None:
    text = written()[f"{TABLES}/flags.md"]
    for cls in SERVICES.values():
        assert all(f"`{flag}`" in text for flag, *_ in describe(cls))


def test_every_subject_bucket_and_stream_is_listed_with_what_it_holds() -> None:
    text = written()[f"{TABLES}/bus.md"]
    for subject in subjects.SUBJECTS:
        assert f"| `{subject.pattern}` | [{subject.message.__name__}]" in text
        assert f"\n### {subject.message.__name__}\n" in text
    assert RECORDS.keys() == {bucket.name for bucket in subjects.BUCKETS}
    assert all(f"`{stream.name}`" in text for stream in subjects.STREAMS)


def test_every_event_type_is_listed() -> None:
    declared = {cls for name, cls in vars(routing_events).items() if name.endswith("Event")}
    assert set(routing_events.TYPES.values()) == declared
    assert all(f"\n## {kind}\n" in written()[f"{TABLES}/events.md"] for kind in routing_events.TYPES)
