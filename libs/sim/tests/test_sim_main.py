"""The command: settings, several engines in a process, signals."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from penstock.common.settings import SettingsError, load
from penstock.sim.__main__ import main
from penstock.sim.settings import SimSettings


def settings(*argv: str) -> SimSettings:
    return load(SimSettings, argv, prog="penstock sim", environ={})


@asynccontextmanager
async def command(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "penstock.sim", *argv), stdout=asyncio.subprocess.PIPE, env=environ
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def url_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        line = (await process.stdout.readline()).decode().strip()
    assert line.startswith("listening on http://")
    return line.removeprefix("listening on ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_all_engines_with_exit_code_0_even_with_a_stream_open(
    number: signal.Signals,
) -> None:
    async with command("--port", "0", "--count", "2", "--decode-step-ms", "60000") as process:
        urls = [await url_of(process), await url_of(process)]
        assert urls[0] != urls[1]
        async with aiohttp.ClientSession() as session:
            for url in urls:
                async with session.get(f"{url}/health") as response:
                    assert response.status == 200
            body = {"prompt": "a", "max_tokens": 5, "stream": True}
            async with session.post(f"{urls[0]}/v1/completions", json=body) as response:
                await response.content.readuntil(b"\n\n")
                process.send_signal(number)
                async with asyncio.timeout(10):
                    assert await process.wait() == 0


async def test_engines_of_one_process_have_their_own_state() -> None:
    async with command("--port", "0", "--count", "2", "--instant") as process:
        first, second = await url_of(process), await url_of(process)
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{first}/v1/completions", json={"prompt": "a"}) as response:
                assert response.status == 200
            totals = []
            for url in (first, second):
                async with session.get(f"{url}/sim/state") as response:
                    totals.append((await response.json())["requests_total"])
    assert totals == [1, 0]


async def test_a_port_that_is_taken_is_exit_code_2_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    async with command("--port", "0") as process:
        port = (await url_of(process)).rpartition(":")[2]
        async with command("--port", port) as second:
            assert await second.wait() == 2
    assert f"--port {port}: cannot listen" in capfd.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "70000"],
        ["--no-such-flag"],
        ["--role", "worker"],
        ["--step-token-budget", "8"],
        ["--model", ","],
    ],
)
def test_bad_settings_are_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--max-model-len", "200", "--kv-blocks", "10"], "--max-model-len is at most --kv-blocks"),
        (["--port", "65535", "--count", "2"], "goes past port 65535"),
        (["--model", "a,b", "--lora-adapters", "b"], "name something twice"),
    ],
)
def test_contradictions_are_named(argv: list[str], fault: str) -> None:
    with pytest.raises(SettingsError, match=fault):
        settings(*argv)


def test_speedup_shortens_every_modelled_time() -> None:
    plain, fast = settings().spec(), settings("--speedup", "10").spec()
    assert fast.step_duration_s(100, 4) == pytest.approx(plain.step_duration_s(100, 4) / 10)


def test_instant_leaves_no_time_that_a_timer_would_notice() -> None:
    assert settings("--instant").spec().step_duration_s(100_000, 256) < 1e-9


def test_the_default_engine_starts_within_tens_of_ms_and_decodes_at_20_to_30_ms() -> None:
    spec = settings().spec()
    assert spec.step_duration_s(256, 0) == pytest.approx(0.032)
    assert [spec.step_duration_s(0, n) for n in (1, 32)] == [pytest.approx(0.0203), pytest.approx(0.0296)]


def test_the_model_length_follows_a_small_kv_cache() -> None:
    assert settings().profile().max_model_len == 32_768
    assert settings("--kv-blocks", "10").profile().max_model_len == 160


def test_lists_of_names_are_comma_separated() -> None:
    profile = settings("--model", "a, b", "--lora-adapters", "c").profile()
    assert (profile.models, profile.lora_adapters) == (("a", "b"), ("c",))
