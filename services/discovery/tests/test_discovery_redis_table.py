"""The table of Redis's records: readings, notices, ages and clocks, lost data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.model import Endpoint, Instance
from penstock.common.records import Record, RecordError
from penstock.discovery.moment import Moment
from penstock.discovery.redis_table import MAX_RECORDS, PREFIX, Reading, RedisTable, Value

TTL_S = 60.0
WALL_S = 1_700_000_000.0
AT = Moment(1000.0, WALL_S)


def parse(key: str, value: bytes) -> Record:
    """`id port timestamp_s` in plain text."""
    try:
        name, port, stamp_s = value.decode().split()
        return Record((Instance(id=name, endpoint=Endpoint("h", int(port))),), int(float(stamp_s) * 1000))
    except ValueError:
        raise RecordError("it is bad") from None


def written(name: str, age_s: float = 0.0, port: int = 1) -> bytes:
    """Negative ages are in the future; an age of `WALL_S` is no timestamp at all."""
    return f"{name} {port} {WALL_S - age_s}".encode()


def later(seconds: float, wall_jump_s: float = 0.0) -> Moment:
    return Moment(AT.now_s + seconds, AT.wall_s + seconds + wall_jump_s)


def reading(*records: tuple[str, Value], epoch: str = "one", cut: bool = False) -> Reading:
    return Reading({key.encode(): value for key, value in records}, epoch, cut)


def table(*records: tuple[str, Value], epoch: str = "one") -> RedisTable:
    made = RedisTable(parse, TTL_S)
    made.replace(reading(*records, epoch=epoch), AT)
    return made


def listed(made: RedisTable) -> list[str]:
    return [instance.id for instance in made.state()[0]]


def faults(made: RedisTable) -> dict[str, str]:
    return made.state()[1]


def test_what_a_reading_does_not_name_is_gone() -> None:
    made = table(("a", written("a")), ("b", written("b")))
    assert made.replace(reading(("b", written("b"))), later(1))
    assert listed(made) == ["b"]


def test_a_record_that_is_too_old_when_it_is_seen_first_is_passed_over() -> None:
    made = table(("a", written("a", age_s=61)), ("b", written("b", age_s=59)))
    assert listed(made) == ["b"]
    assert faults(made) == {"a": "its timestamp is older than 60 s"}


def test_a_record_ends_by_its_timestamp_unless_it_is_written_again() -> None:
    made = table(("a", written("a", age_s=50)), ("b", written("b")))
    assert made.next_expiry_s() == AT.now_s + 10
    assert not made.expire(AT.now_s + 9)
    assert made.expire(AT.now_s + 10)
    assert listed(made) == ["b"]
    made.replace(reading(("a", written("a", age_s=50)), ("b", written("b"))), later(11))
    assert listed(made) == ["b"]
    assert made.replace(reading(("a", written("a", age_s=-11)), ("b", written("b"))), later(11))
    assert listed(made) == ["a", "b"]


def test_a_heartbeat_makes_no_difference_to_others() -> None:
    made = table(("a", written("a")))
    assert not made.replace(reading(("a", written("a", age_s=-10))), later(10))
    assert not made.put(b"a", written("a", age_s=-20), later(20))
    assert made.next_expiry_s() == AT.now_s + 20 + TTL_S


def test_a_record_without_a_timestamp_lives_as_long_as_its_key() -> None:
    made = table(("a", written("a", age_s=WALL_S)))
    assert made.next_expiry_s() is None
    made.replace(reading(), later(1))
    assert listed(made) == []


def test_a_record_ahead_of_time_ends_no_later_than_one_written_at_once() -> None:
    made = table(("a", written("a", age_s=-1e6)))
    assert made.next_expiry_s() == AT.now_s + TTL_S


def test_a_clock_that_jumps_ends_nothing_that_is_written_again() -> None:
    made = table(("a", written("a")))
    for step, jump_s in enumerate((3600.0, -3600.0, 1e6, -1e6), 1):
        at = later(step * 10.0, jump_s)
        made.replace(reading(("a", written("a", age_s=step * -10.0))), at)
        made.expire(at.now_s)
        assert listed(made) == ["a"]
        assert made.next_expiry_s() == at.now_s + TTL_S


def test_a_writer_whose_clock_is_behind_is_listed_from_its_second_record_on() -> None:
    made = table(("a", written("a", age_s=500)))
    assert listed(made) == []
    made.replace(reading(("a", written("a", age_s=490))), later(10))
    assert listed(made) == ["a"]


def test_an_older_record_in_place_of_a_living_one_is_judged_by_its_timestamp() -> None:
    made = table(("a", written("a")))
    made.put(b"a", written("a", age_s=61), later(1))
    assert listed(made) == []


def test_a_changed_record_is_a_change() -> None:
    made = table(("a", written("a")))
    assert made.put(b"a", written("a", age_s=-1, port=2), later(1))
    assert made.state()[0][0].endpoint.port == 2


def test_a_notice_of_a_deletion_ends_the_instance() -> None:
    made = table(("a", written("a")))
    assert made.drop(b"a")
    assert not made.drop(b"a")
    assert listed(made) == []


def test_what_was_lost_stays_for_one_time_so_that_it_can_be_written_again() -> None:
    made = table(("a", written("a", age_s=50)), ("b", written("b")))
    assert not made.replace(reading(epoch="two"), later(1))
    made.replace(reading(("b", written("b", age_s=-5)), epoch="two"), later(5))
    assert listed(made) == ["b", "a"]
    assert made.expire(AT.now_s + 1 + TTL_S)
    assert listed(made) == ["b"]


def test_deletions_in_the_same_epoch_are_deletions_even_of_the_last_record() -> None:
    made = table(("a", written("a")))
    assert made.replace(reading(), later(1))
    assert listed(made) == []


def test_where_the_store_says_no_epoch_all_gone_at_once_is_a_loss() -> None:
    made = table(("a", written("a")), ("b", written("b")), epoch="")
    made.replace(reading(("b", written("b")), epoch=""), later(1))
    assert listed(made) == ["b"]
    made.replace(reading(epoch=""), later(2))
    assert listed(made) == ["b"]
    made.expire(AT.now_s + 2 + TTL_S)
    assert listed(made) == []


def test_an_old_backup_ends_nothing_that_is_written_again_in_time() -> None:
    made = table(("a", written("a")))
    for step in (1, 2):
        made.replace(reading(("a", written("a", age_s=500, port=9)), epoch="two"), later(step))
        assert listed(made) == ["a"]
        assert made.state()[0][0].endpoint.port == 1
    made.replace(reading(("a", written("a", age_s=-3, port=2)), epoch="two"), later(3))
    assert made.state()[0][0].endpoint.port == 2
    assert made.next_expiry_s() == AT.now_s + 3 + TTL_S


def test_an_old_backup_that_nobody_writes_again_ends_after_one_time() -> None:
    made = table(("a", written("a")))
    old = reading(("a", written("a", age_s=500)), epoch="two")
    made.replace(old, later(1))
    made.replace(old, later(1 + TTL_S))
    made.replace(old, later(2 + TTL_S))
    assert listed(made) == []
    assert "a" in faults(made)


def test_after_an_outage_everything_listed_has_its_whole_time() -> None:
    made = table(("a", written("a", age_s=50)), ("b", written("b")))
    made.replace(reading(("a", written("a", age_s=50))), later(600), was_away=True)
    assert listed(made) == ["a", "b"]
    assert made.next_expiry_s() == AT.now_s + 600 + TTL_S


def test_an_id_is_listed_once_and_the_other_key_named() -> None:
    made = table(("k1", written("a")), ("k2", written("a", port=2)))
    assert [i.endpoint.port for i in made.state()[0]] == [1]
    assert faults(made) == {"k2": "instance a stands under k1 already"}


def test_what_cannot_be_read_is_named_and_harms_no_other() -> None:
    made = RedisTable(parse, TTL_S)
    values: dict[bytes, Value] = {b"a": written("a"), b"b": b"?", b"\xff": b"", b"d": "it is not a string"}
    made.replace(Reading(values, cut=True), AT)
    assert listed(made) == ["a"]
    assert {key: why for key, why in faults(made).items() if key != PREFIX} == {
        "b": "it is bad",
        "\\xff": "its key is not UTF-8",
        "d": "it is not a string",
    }
    assert str(MAX_RECORDS) in faults(made)[PREFIX]


def test_notices_of_more_records_than_the_bound_are_left_to_the_next_reading() -> None:
    made = table(*((str(n), written(str(n))) for n in range(MAX_RECORDS)))
    assert not made.put(b"more", written("more"), later(1))
    assert made.put(b"7", written("7", port=2), later(1))


keys = st.sampled_from(["a", "b", "c"])
ages = st.integers(-100, 100).map(float)
records = st.dictionaries(keys, ages).map(
    lambda held: reading(*((k, written(k, a)) for k, a in held.items()))
)


@given(st.lists(records), records)
def test_repeated_and_stale_readings_leave_what_the_last_one_says(
    before: list[Reading], last: Reading
) -> None:
    """Within one epoch: what is listed is named by the last reading, and two tables that saw it agree once
    it is repeated after the time of a record."""
    made = table()
    for held in before:
        made.replace(held, AT)
    made.replace(last, AT)
    made.replace(last, AT)
    fresh = {key.decode() for key, value in last.values.items() if float(value.split()[2]) > WALL_S - TTL_S}
    assert fresh <= set(listed(made)) <= {key.decode() for key in last.values}
