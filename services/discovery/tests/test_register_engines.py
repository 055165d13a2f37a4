"""What the sidecar makes of its settings and of an engine's answers."""

from __future__ import annotations

import msgspec
import pytest

from penstock.common.codec import encode_record
from penstock.common.model import Endpoint, Instance, Role
from penstock.discovery.reconcile import Verdict
from penstock.discovery.register.engines import LocalEngine, ServerInfo, Watched, parse_server_info

GOOD = Verdict(models=("m",), lora_adapters=("l",), owner="vllm", engine="vllm")
BAD = Verdict("refused", "connection refused")
HERE = Endpoint("127.0.0.1", 8000)


def watched(rise: int = 1, fall: int = 2, **known: bool) -> Watched:
    return Watched(LocalEngine(HERE, Instance(id="a", endpoint=HERE), **known), rise, fall)


def test_an_engine_is_registered_with_what_it_says_of_itself() -> None:
    one = watched()
    assert one.record is None
    one.judge(GOOD)
    assert one.record == Instance(
        id="a", endpoint=HERE, models=("m",), lora_adapters=("l",), owner="vllm", engine="vllm"
    )


def test_what_the_settings_say_beats_what_the_engine_says() -> None:
    base = Instance(id="a", endpoint=HERE, models=("x",), owner="me", engine="mine", role=Role.DECODE)
    one = Watched(LocalEngine(HERE, base))
    one.judge(GOOD)
    assert one.record == msgspec.structs.replace(base, lora_adapters=("l",))


@pytest.mark.parametrize(
    ("verdicts", "healthy"),
    [
        ([BAD], False),
        ([GOOD, BAD], True),
        ([GOOD, BAD, BAD], False),
        ([GOOD, BAD, GOOD, BAD], True),
        ([BAD, GOOD], False),
        ([BAD, GOOD, GOOD], True),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else "-".join(v.fault or "good" for v in value),
)
def test_rise_and_fall_count_probes_in_a_row_and_the_first_decides_alone(
    verdicts: list[Verdict], healthy: bool
) -> None:
    one = watched(rise=2, fall=2)
    for verdict in verdicts:
        one.judge(verdict)
    assert one.healthy is healthy


def test_an_engine_with_more_names_than_its_share_is_not_healthy() -> None:
    one = Watched(LocalEngine(HERE, Instance(id="a", endpoint=HERE)), max_names_bytes=100)
    one.judge(Verdict(models=tuple(f"model-{n}" for n in range(50))))
    healthy, reason = one.healthy, one.reason
    assert (healthy, reason) == (False, "its names take more than 100 bytes")


def test_names_that_cannot_be_printed_are_a_failed_probe() -> None:
    one = watched()
    one.judge(Verdict(models=("m\n",)))
    assert (one.healthy, one.reason) == (False, "its names hold characters that cannot be printed")


def test_sglang_is_asked_for_role_ranks_and_bootstrap_port_and_others_are_not() -> None:
    one = watched(role_known=False, size_known=False)
    asks = []
    for engine in ("vllm", "sglang"):
        one.judge(Verdict(models=("m",), engine=engine))
        asks.append(one.asks_for_info)
    assert asks == [False, True]
    one.info = ServerInfo("prefill", 8998, 4)
    record = one.record
    assert record is not None
    assert (record.role, record.bootstrap_port, record.dp_size) == (Role.PREFILL, 8998, 4)
    one.judge(BAD)
    assert one.info is None, "another engine may answer at this address next"


def test_a_decode_engine_has_no_bootstrap_port_and_flags_beat_server_info() -> None:
    one = watched(role_known=True, size_known=True)
    one.judge(GOOD)
    one.info = ServerInfo("decode", 8998, 4)
    record = one.record
    assert record is not None
    assert (record.role, record.bootstrap_port, record.dp_size) == (Role.NEUTRAL, 0, 1)


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        b"[]",
        b"{",
        b'{"dp_size": 0}',
        b'{"dp_size": "x"}',
        b'{"disaggregation_bootstrap_port": 1e9}',
    ],
)
def test_a_server_info_that_is_none_is_passed_over(body: bytes | None) -> None:
    assert parse_server_info(body) is None


def test_a_server_info_is_read_whatever_else_it_holds() -> None:
    body = encode_record({"disaggregation_mode": "null", "dp_size": 2, "model_path": "x", "token": [1]})
    assert parse_server_info(body) == ServerInfo("null", None, 2)
