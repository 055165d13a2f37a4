"""Traces: what is read, what is refused, and when requests arrive."""

import gzip
from pathlib import Path

import pytest

from penstock.cli.replay.trace import MAX_LINE_BYTES, TraceFault, read, timed
from penstock.scheduler.chain import unpack

LINE = '{"timestamp": %d, "input_length": %d, "output_length": 5, "hash_ids": %s}\n'


def write(folder: Path, *lines: str, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(lines))
    return path


def test_requests_come_in_order_of_time_with_the_hashes_of_their_full_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, LINE % (3000, 25, [1, 2, 3]), LINE % (1000, 20, [1, 2]))
    first, second = read(path, 10)
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in (first, second)] == [
        (1.0, 20, 5),
        (3.0, 25, 5),
    ]
    # The third block of the later one is partial.
    assert len(first.packed_hashes) == 16
    assert first.packed_hashes == second.packed_hashes


def test_equal_ids_after_different_ones_are_different_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, LINE % (0, 20, [1, 9]), LINE % (0, 20, [2, 9]))
    one, other = (unpack(request.packed_hashes) for request in read(path, 10))
    assert one[1] != other[1]


def test_small_ids_stay_different_in_the_scheduler(tmp_path: Path) -> None:
    path = write(tmp_path, *[LINE % (0, 10, [number]) for number in range(100)])
    assert len({tuple(unpack(request.packed_hashes)) for request in read(path, 10)}) == 100


def test_a_packed_trace_and_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress((LINE % (0, 10, [1]) * 5).encode()))
    assert len(read(path, 10)) == 5
    assert len(read(path, 10, limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no requests"),
        ("{}\n", "line 1: Object missing required field `timestamp`"),
        (LINE % (0, 10, [1]) + "nonsense\n", "line 2: JSON is malformed"),
        (LINE % (0, 0, []), "line 1: Expected `int` >= 1"),
        (LINE % (0, 10, [-1]), "line 1: Expected `int` >= 0"),
        (LINE % (0, 10, [1, 2]), "2 hash_ids, but 10 tokens are 1 blocks of 10; --block-size"),
        (LINE % (0, 10**7, list(range(2049))), "line 1: Expected `array` of length <= 2048"),
        ("[" * 10_000 + "\n", "line 1: "),
        ("1" * (MAX_LINE_BYTES + 1), f"line 1 is longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(TraceFault) as fault:
        read(write(tmp_path, text), 10)
    assert complaint in str(fault.value)


@pytest.mark.parametrize(
    ("name", "complaint"), [("no.jsonl", "No such file"), ("no.jsonl.gz", "No such file")]
)
def test_a_trace_that_is_not_there_is_a_fault(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(TraceFault, match=complaint):
        read(tmp_path / name, 10)


def test_what_is_not_packed_though_its_name_says_so_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(TraceFault, match="gzip"):
        read(write(tmp_path, LINE % (0, 10, [1]), name="trace.gz"), 10)


def test_times_are_scaled_and_equal_ones_spread(tmp_path: Path) -> None:
    lines = [LINE % (at_ms, 10, [1]) for at_ms in (0, 0, 3000, 3000, 3000, 9000, 9000)]
    trace = read(write(tmp_path, *lines), 10)
    assert timed(trace, 2.0, spread=False) == [0.0, 0.0, 1.5, 1.5, 1.5, 4.5, 4.5]
    assert timed(trace, 1.0, spread=True) == [0.0, 1.5, 3.0, 5.0, 7.0, 9.0, 12.0]
