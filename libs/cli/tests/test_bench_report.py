"""Rounds become medians and comparisons, and these become a table and JSON."""

import math
import os
from pathlib import Path

import msgspec
import pytest

from penstock.cli.bench.__main__ import tell
from penstock.cli.bench.clients import Address, Tally
from penstock.cli.bench.cores import busy_s, choose_cores, cpu_by_part, resident_mb
from penstock.cli.bench.measures import TABLE, Against, Column, When
from penstock.cli.bench.nginx import Nginx
from penstock.cli.bench.report import as_json, header, table
from penstock.cli.bench.results import Results, Spread
from penstock.cli.bench.run import Run
from penstock.cli.bench.settings import MEASURES, BenchSettings, chosen
from penstock.cli.bench.stacks import FullStack, LocalStack
from penstock.cli.bench.way import CACHE_AWARE, DIRECT, LEAST_REQUEST, LOCAL, NGINX, WAYS
from penstock.cli.bench.window import Window
from penstock.common.settings import SettingsError, load

ENGINES = [Address("127.0.0.1", 7001), Address("127.0.0.1", 7002)]


def read(*argv: str) -> BenchSettings:
    return load(BenchSettings, argv, prog="bench", environ={})


def results() -> Results:
    """Three rounds in which the machine is ever slower; the last one has no figure of nginx."""
    made = Results()
    for number, (nginx, local) in enumerate([(100.0, 40.0), (50.0, 25.0), (math.nan, 10.0)], 1):
        made.add("chat-1k", NGINX, number, {"per_core": nginx})
        made.add("chat-1k", LOCAL, number, {"per_core": local, "rate": 1234.5})
        made.add("latency", LOCAL, number, {"p50_us": 300.0 + number})
        made.add("latency", DIRECT, number, {"p50_us": 100.0 * number})
    return made


def test_ratios_and_differences_are_made_in_each_round_before_they_are_summed_up() -> None:
    made = results()
    assert made.spread("chat-1k", LOCAL, "per_core") == Spread(25.0, 10.0, 40.0)
    assert made.ratio("chat-1k", LOCAL, "per_core", NGINX) == Spread(0.45, 0.4, 0.5)
    assert made.added("latency", LOCAL, "p50_us", DIRECT) == Spread(102.0, 3.0, 201.0)
    assert made.everywhere("p50_us") == Spread(300.5, 100.0, 303.0)


def test_what_was_not_measured_has_no_figure() -> None:
    made = results()
    assert made.spread("chat-1k", NGINX, "nothing") is None
    assert made.ratio("chat-1k", LOCAL, "rate", NGINX) is None
    assert made.added("paced", LOCAL, "p50_us", DIRECT) is None
    assert made.spread("chat-1k", NGINX, "per_core") == Spread(75.0, 50.0, 100.0)


def test_a_window_divides_by_what_was_done_in_it() -> None:
    window = Window(2.0, 1000, range(1000, 101_000, 1000), {"gateway": 0.05, "nats": 0.002}, core_s=0.25)
    assert (window.rate, window.gateway_ratio, window.foreign_ratio) == (500.0, 0.025, 0.1)
    assert window.each_us("gateway") == pytest.approx(50.0)
    assert window.per_core == pytest.approx(20_000.0)
    assert (window.percentile_us(50), window.percentile_us(99), window.percentile_us(100)) == (51, 100, 100)
    assert math.isnan(window.each_us("scheduler"))


def test_a_window_in_which_nothing_was_done_has_no_figures() -> None:
    window = Window(2.0, 0, [], {"gateway": 0.0})
    assert math.isnan(window.percentile_us(50))
    assert math.isnan(window.each_us("gateway"))
    assert math.isnan(window.per_core)


def run(*ways: str) -> Run:
    made = Run(7, 0.0, results=results(), ways=list(ways), measures=[TABLE[0], TABLE[2]])
    made.results.add("chat-1k", LOCAL, 1, {"foreign_percent": 30.0})
    return made


def test_the_table_has_a_line_for_each_way_and_ratios_to_nginx() -> None:
    lines = table(read(), run(DIRECT, NGINX, LOCAL)).splitlines()
    assert lines[0] == "1 KB chats, 64 connections"
    assert lines[1].split()[:3] == ["req/s", "x", "nginx"]
    [local] = [line for line in lines if line.startswith(LOCAL) and "0.45" in line]
    assert local.split() == ["local", "1,234", "25", "0.45", "(0.40..0.50)"]
    assert "1 KB chats at 200 a second" in lines
    assert "102 (3..201)" in lines[-1]


def test_without_nginx_the_ratios_are_to_direct_calls() -> None:
    made = run(DIRECT, LOCAL)
    for number in (1, 2, 3):
        made.results.add("chat-1k", DIRECT, number, {"rate": 12_345.0})
    text = table(read(), made)
    assert "x direct" in text
    assert "nginx" not in text
    assert "0.10 (0.10..0.10)" in text


def test_placement_by_prefix_is_compared_with_least_request_in_each_round() -> None:
    made = run(LEAST_REQUEST, CACHE_AWARE)
    for number, (fewest, aware) in enumerate([(1000.0, 900.0), (500.0, 500.0), (800.0, 640.0)], 1):
        made.results.add("chat-1k", LEAST_REQUEST, number, {"rate": fewest})
        made.results.add("chat-1k", CACHE_AWARE, number, {"rate": aware})
    _, heads, *rows = table(read(), made).splitlines()
    assert "req/s x least-request" in heads
    assert [row.count("0.90 (0.80..1.00)") for row in rows[:2]] == [0, 1]
    assert "x least-request" not in table(read(), run(NGINX, LOCAL))


def test_json_holds_every_round_and_the_comparisons() -> None:
    plain = msgspec.json.decode(msgspec.json.encode(as_json(read("--json", "x.json"), run(NGINX, LOCAL))))
    assert plain["figures"]["chat-1k"]["local"]["per_core"] == [40.0, 25.0, 10.0]
    assert plain["compared"]["chat-1k"]["local"]["per_core / nginx"] == {
        "median": 0.45,
        "low": 0.4,
        "high": 0.5,
    }
    assert (plain["seed"], plain["settings"]["json"]) == (7, "x.json")


def test_a_wrong_answer_is_printed_and_makes_the_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    made = run(NGINX, LOCAL)
    assert tell(read(), made) == 0
    made.failed = 2
    made.failures["local, chat-1k: another answer than expected"] = 2
    assert tell(read(), made) == 1
    assert "FAILED 2 times: local, chat-1k: another answer than expected" in capsys.readouterr().out


def test_answers_that_came_another_way_are_noted_as_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    made = run(NGINX, LOCAL)
    made.heads["local", "chat-1k"], made.strays["local", "chat-1k"] = 200, 3
    made.heads["nginx", "chat-1k"], made.strays["nginx", "chat-1k"] = 100, 0
    assert tell(read(), made) == 0
    assert "note: local, chat-1k: 1.5% of the answers came another way\n" in capsys.readouterr().out
    assert len(made.stray_notes()) == 1


def test_a_busy_machine_is_said_to_be_one() -> None:
    made = run(NGINX, LOCAL)
    made.pinned = True
    assert any("30 %" in line for line in header(read(), made))
    assert any("busy" in line for line in header(read(), made))
    assert any("--seed 7" in line for line in header(read(), made))
    assert any(line.startswith("ingress runs as ") for line in header(read(), made))


def test_every_measurement_can_be_chosen_by_its_name_and_shows_what_it_has() -> None:
    assert tuple(measure.name for measure in TABLE) == MEASURES
    named = read().model_dump()
    for measure in TABLE:
        assert "{" not in measure.title.format_map(named)
        assert measure.ways([*WAYS, "other router"])
        assert all(isinstance(column, Column) for column in measure.columns)
    ratios = [c for measure in TABLE for c in measure.columns if c.against is Against.BASE]
    assert all("nginx" in column.heading for column in ratios)
    assert {measure.when for measure in TABLE} == set(When)


def test_other_routers_are_not_attacked_and_direct_calls_have_no_memory() -> None:
    by_name = {measure.name: measure for measure in TABLE}
    every = [*WAYS, "other router"]
    assert by_name["hostile"].ways(every) == [DIRECT, NGINX, LOCAL, LEAST_REQUEST]
    assert by_name["memory"].ways(every) == [NGINX, LOCAL, LEAST_REQUEST, "other router"]


def test_a_quick_run_is_short_unless_told_otherwise() -> None:
    assert (read().slot_s, read().repeats) == (2.0, 3)
    assert (read("--quick").slot_s, read("--quick").repeats) == (0.3, 2)
    assert (read("--quick", "--seconds", "5").slot_s, read("--quick", "--rounds=4").repeats) == (5.0, 4)


def test_a_choice_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError) as caught:
        read("--ways", "nginx,haproxy", "--measures", "speed")
    [ways, measures] = sorted(caught.value.faults, reverse=True)
    assert "there is no haproxy; there are direct, nginx, local" in ways
    assert "there is no speed; there are chat-1k" in measures
    assert chosen(" nginx, local ", WAYS) == ["nginx", "local"]
    assert chosen("", WAYS) == list(WAYS)


def test_nginx_gets_every_engine_and_streams_a_listener_without_buffering(tmp_path: Path) -> None:
    proxy = Nginx("nginx", ENGINES, (7101, 7102), tmp_path, {}, access_log=False)
    config = (tmp_path / "nginx.conf").read_text()
    assert "server 127.0.0.1:7001 max_fails=0;" in config
    assert "server 127.0.0.1:7002 max_fails=0;" in config
    plain, streams = config.split("listen ")[1:]
    assert plain.startswith("127.0.0.1:7101 ")
    assert "proxy_buffering" not in plain
    assert streams.startswith("127.0.0.1:7102 ")
    assert "proxy_buffering off;" in streams
    assert "access_log off;" in config
    assert "{" + "folder" not in config
    assert proxy.commands[0].argv == ("nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"))


def test_both_stacks_serve_the_engines_and_the_local_one_has_no_scheduler(
    tmp_path: Path,
) -> None:
    [up] = FullStack(ENGINES, 7201, {}, access_log=False).commands
    assert "--llm-backend-endpoints=127.0.0.1:7001,127.0.0.1:7002" in up.argv
    assert {"--port=7201", "--admin-port=0", "--access-log=false"} <= set(up.argv)
    local = LocalStack(ENGINES, (7301, 7302), tmp_path, {}, access_log=True).commands
    assert [command.name for command in local] == ["local-nats", "local-discovery", "local-ingress"]
    assert {"--port=7302", "--access-log=true"} <= set(local[2].argv)
    assert all("--nats-url=nats://127.0.0.1:7301" in command.argv for command in local[1:])


def test_cpu_time_is_counted_by_part_and_grows_with_work() -> None:
    parts = {"gateway": [os.getpid()], "nats": []}
    before, core_before = cpu_by_part(parts), busy_s([0])
    sum(number * number for number in range(300_000))
    after = cpu_by_part(parts)
    assert after["gateway"] > before["gateway"]
    assert after["nats"] == 0
    assert busy_s([0]) >= core_before
    assert resident_mb([os.getpid()]) > 1


def test_the_gateway_shares_its_core_with_nobody() -> None:
    cores = choose_cores()
    assert not cores.gateway & cores.load
    assert cores.pinned == (len(cores.gateway) == 1)


def test_failures_beyond_a_bound_are_counted_and_not_kept() -> None:
    tally = Tally()
    for _ in range(1000):
        tally.fail("no")
    assert (tally.failed, len(tally.failures)) == (1000, 100)
