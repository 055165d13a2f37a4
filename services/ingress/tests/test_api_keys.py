"""API keys: who is let in, for what, and what an instance gets to see of it."""

from __future__ import annotations

import asyncio
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.live_config import KEY, ConfigRecord, LiveConfig, config_key
from penstock.common.settings import SettingsError, load
from penstock.ingress.api_keys import LIVE, ApiKey, ApiKeys, BadKeys, read_key, read_keys
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import HeadMemo, parse_request
from penstock.ingress.key_keeping import KeyKeeper
from penstock.ingress.limit_settings import UserRecord
from penstock.ingress.limiter import Limiter
from penstock.ingress.settings import IngressSettings

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, Lab, Response
from .scripted import config

SECRET = "sk-alice-0123456789abcdef"


def hashed(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def api_key(key: str = SECRET, **fields: Any) -> ApiKey:
    return read_key({"hashes": [hashed(key)], "owner": "alice", **fields})


class Clock:
    """The time of day, which tests move."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


async def guarded(lab_of: LabOf, *keys: ApiKey, **settings: Any) -> tuple[Lab, ApiKeys]:
    lab = await lab_of(**settings)
    held = lab.gateway.api_keys = ApiKeys(Clock())
    held.replace([{f"key{number}": key for number, key in enumerate(keys)}])
    return lab, held


BAD = [
    ({}, "an API key is required"),
    ({"authorization": ""}, "an API key is required"),
    ({"authorization": "Basic c2s6YQ=="}, "an API key is required"),
    ({"authorization": SECRET}, "an API key is required"),
    ({"authorization": "Bearer"}, "an API key is required"),
    ({"authorization": "Bearer " + "x" * 2000}, "an API key is required"),
    ({"authorization": f"Bearer {SECRET}x"}, "incorrect API key"),
    ({"authorization": f"Bearer {SECRET[:-1]}"}, "incorrect API key"),
    ({"authorization": f"Bearer {hashed(SECRET)}"}, "incorrect API key"),
    ({"authorization": "Bearer \xff\xfe"}, "incorrect API key"),
    ({"x_api_key": "wrong"}, "incorrect API key"),
]


@pytest.mark.parametrize(("headers", "says"), BAD)
async def test_without_a_good_key_no_instance_is_asked(
    lab_of: LabOf, headers: dict[str, str], says: str
) -> None:
    lab, _ = await guarded(lab_of, api_key())
    engine = await lab.engine()
    answer = await (await lab.client()).ask(BODY, **headers)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.error["message"].startswith(says)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert SECRET not in answer.wire.decode("latin-1")
    assert engine.connections == 0


async def test_a_refused_request_is_refused_before_its_body(lab_of: LabOf) -> None:
    lab, _ = await guarded(lab_of, api_key())
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n".encode())
    answer = await client.response()
    assert answer.status == 401


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/nowhere"])
async def test_probes_need_no_key(lab_of: LabOf, path: str) -> None:
    lab, _ = await guarded(lab_of)
    client = await lab.client()
    client.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert (await client.response()).status != 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SECRET}"},
        {"Authorization": f"bearer  {SECRET} "},
        {"x_api_key": SECRET},
    ],
)
@pytest.mark.parametrize(("engine_key", "seen"), [("", None), ("engine-secret", "Bearer engine-secret")])
async def test_the_instance_sees_its_own_key_and_never_the_clients(
    lab_of: LabOf, headers: dict[str, str], engine_key: str, seen: str | None
) -> None:
    lab, _ = await guarded(lab_of, api_key(), engine_api_key=engine_key)
    engine = await lab.engine()
    client = await lab.client()
    client.post(BODY, x_other="stays", **headers)
    peer = await engine.accept()
    first, given, body = await peer.request()
    assert (first, body) == (f"POST {CHAT} HTTP/1.1", BODY)
    assert (given.get("authorization"), given.get("x-api-key"), given["x-other"]) == (seen, None, "stays")


async def test_without_api_keys_the_header_passes_as_it_came(lab_of: LabOf) -> None:
    lab = await lab_of(engine_api_key="engine-secret")
    engine = await lab.engine()
    client = await lab.client()
    client.post(BODY, authorization="Bearer whatever")
    _, given, _ = await (await engine.accept()).request()
    assert given["authorization"] == "Bearer whatever"


async def test_a_key_is_good_for_its_models_alone(lab_of: LabOf) -> None:
    lab, _ = await guarded(lab_of, api_key(models=["other"]))
    await lab.engine()
    answer = await (await lab.client()).ask(BODY, authorization=f"Bearer {SECRET}")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    client = await lab.client()
    client.send(f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\n\r\n".encode())
    assert json.loads((await client.response()).body)["data"] == []


@pytest.mark.parametrize(("limits_user", "statuses"), [("key", [200, 429, 429]), ("header", [200, 429, 200])])
async def test_limits_count_for_the_keys_owner_or_for_whom_the_header_names(
    lab_of: LabOf, limits_user: str, statuses: list[int]
) -> None:
    lab, _ = await guarded(lab_of, api_key(), limits_default_rpm=1, limits_user=limits_user)
    engine = await lab.engine()
    lab.gateway.limits = Limiter(lab.settings, lab.metrics, lab.gateway.degraded, Clock()).if_active

    async def answers() -> None:
        peer = await engine.accept()
        while True:
            await peer.request()
            peer.answer()

    async with asyncio.TaskGroup() as tasks:
        answering = tasks.create_task(answers())
        for user, status in zip(("u", "u", "forged"), statuses, strict=True):
            answer = await (await lab.client()).ask(BODY, authorization=f"Bearer {SECRET}", user=user)
            assert answer.status == status
        answering.cancel()


async def test_a_key_has_limits_of_its_own_beside_its_owners(lab_of: LabOf) -> None:
    other = "sk-alice-other"
    keys = api_key(rpm=2, tpm=10_000), api_key(other, rpm=1)
    lab, held = await guarded(lab_of, *keys)
    engine = await lab.engine()
    limiter = Limiter(lab.settings, lab.metrics, lab.gateway.degraded, Clock())
    limiter.keys = held
    lab.gateway.limits = limiter.if_active

    async def answers() -> None:
        peer = await engine.accept()
        while True:
            await peer.request()
            peer.answer()

    async def ask(key: str) -> Response:
        return await (await lab.client()).ask(BODY, authorization=f"Bearer {key}", user="forged")

    async with asyncio.TaskGroup() as tasks:
        answering = tasks.create_task(answers())
        first = await ask(SECRET)
        assert (first.status, first.headers["x-ratelimit-limit-requests"]) == (200, "2")
        assert first.headers["x-ratelimit-limit-tokens"] == "10000"
        assert [(await ask(key)).status for key in (other, SECRET, other, SECRET)] == [200, 200, 429, 429]
        refused = (await ask(SECRET)).error["message"]
        assert refused == "the API key is over its limit of 2 requests per minute, 2 are counted"
        # Its owner's count first, whichever key is used.
        limiter.allowances.put("alice", UserRecord(rpm=3))
        held.replace([{"a": api_key(rpm=9), "b": api_key(other)}])
        assert [(await ask(key)).status for key in (SECRET, other, SECRET, other)] == [200, 200, 200, 429]
        held.replace([{"a": api_key()}])
        limiter.allowances.put("alice", None)
        assert limiter.if_active is None
        answering.cancel()


@pytest.mark.parametrize(("limits_user", "routes"), [("key", 1), ("header", 2)])
async def test_a_share_of_users_is_of_those_whom_the_setting_names(
    lab_of: LabOf, limits_user: str, routes: int
) -> None:
    entries = config({"base_url": "local", "weight": 1}, {"base_url": "local", "canary_percent": 50})
    flags = {"route_policy": "weight", "route_config": entries, "limits_user": limits_user}
    lab, _ = await guarded(lab_of, api_key(), **flags)
    engine = await lab.engine()

    async def answers() -> None:
        peer = await engine.accept()
        while True:
            await peer.request()
            peer.answer()

    taken = set()
    async with asyncio.TaskGroup() as tasks:
        answering = tasks.create_task(answers())
        client = await lab.client()
        for number in range(20):
            answer = await client.ask(BODY, authorization=f"Bearer {SECRET}", user=f"forged {number}")
            taken.add(answer.headers["x-penstock-route"])
        answering.cancel()
    assert len(taken) == routes


def head(key: str = SECRET) -> Any:
    return parse_request(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode())


def admitted(keys: ApiKeys, key: str = SECRET) -> str:
    """The owner, or why not."""
    try:
        caller = keys.admit(head(key)).caller
    except Exception as exc:  # noqa: BLE001  # what is raised is what is asked for
        return str(exc)
    assert caller is not None
    return caller.owner


def test_a_key_ends_at_its_moment() -> None:
    clock = Clock()
    keys = ApiKeys(clock)
    keys.replace([{"a": api_key(expires_at="2023-11-14T22:13:30Z")}])
    clock.now = 1_700_000_009.9
    assert admitted(keys) == "alice"
    clock.now = 1_700_000_010.0
    assert "expired" in admitted(keys)


def test_keys_rotate_with_both_good_for_a_while() -> None:
    keys, other = ApiKeys(Clock()), "sk-alice-next"
    keys.replace([{"a": api_key()}])
    assert "incorrect" in admitted(keys, other)
    keys.replace([{"a": api_key(hashes=[hashed(SECRET), hashed(other)])}])
    assert (admitted(keys), admitted(keys, other)) == ("alice", "alice")
    keys.replace([{"a": api_key(other)}])
    assert ("incorrect" in admitted(keys), admitted(keys, other)) == (True, "alice")


def test_of_two_sources_the_first_counts_for_a_hash() -> None:
    keys = ApiKeys(Clock())
    keys.replace([{"a": api_key()}, {"b": api_key(owner="bob")}])
    caller = keys.admit(head()).caller
    assert caller is not None
    assert (caller.key, caller.owner) == ("a", "alice")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[]", "mapping of names"),
        (b"a: [", "no YAML"),
        (b"a: {owner: o}", "'a': hashes: Field required"),
        (f"a: {{owner: o, hashes: [{SECRET}]}}".encode(), "'a': hashes.0: String should match"),
        (f"a: {{owner: o, hashes: [], key: {SECRET}}}".encode(), "key: Extra inputs"),
        (f"a: {{owner: o, hashes: [{'0' * 64}], expires_at: 2030-01-01T00:00:00}}".encode(), "expires_at"),
        (f"a: {{owner: o, hashes: [{'0' * 64}], models: 3}}".encode(), "models: .*tuple"),
    ],
)
def test_a_file_is_refused_without_saying_what_could_be_a_key(text: bytes, says: str) -> None:
    with pytest.raises(BadKeys, match=says) as raised:
        read_keys(text)
    assert SECRET not in str(raised.value)


def test_a_bad_file_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    for text in (None, "a: 3"):
        if text:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError, match="--api-keys"):
            load(IngressSettings, ("--api-keys", str(path)), prog="ingress", environ={})


async def test_a_file_is_followed_and_a_bad_one_leaves_the_last(tmp_path: Path) -> None:
    path, told = tmp_path / "keys.yaml", list[tuple[str, bool, str]]()
    keys = ApiKeys(Clock())

    def write(text: str) -> None:
        fresh = path.with_suffix(".fresh")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)

    write(f"a: {{owner: alice, hashes: [{hashed(SECRET)}]}}")
    keeper = KeyKeeper(keys, str(path), LiveConfig(), lambda *one: told.append(one))
    loop = asyncio.create_task(keeper.follow_file())
    await eventually(lambda: admitted(keys) == "alice")
    write("a: [")
    await eventually(lambda: told)
    assert (admitted(keys), told) == ("alice", [("the API keys' file", True, "it is no YAML")])
    write("{}")
    await eventually(lambda: "incorrect" in admitted(keys))
    assert told[1:] == [("the API keys' file", False, "")]
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def test_keys_of_live_configuration_are_awaited_and_followed() -> None:
    live, keys, told = LiveConfig(), ApiKeys(Clock()), list[tuple[str, bool, str]]()
    keeper = KeyKeeper(keys, LIVE, live, lambda *one: told.append(one))
    assert "not listed yet" in keeper.missing()

    def listed(revision: int, *values: Any) -> None:
        records = [ConfigRecord(value, revision, kind=KEY, name="a") for value in values]
        entries = {config_key(KEY, "a"): Entry(encode_record(one), revision) for one in records}
        keeper.changed(live.apply(Listing(Position("1", revision), entries)))

    listed(1, {"hashes": [hashed(SECRET)], "owner": "alice"})
    assert (keeper.missing(), admitted(keys)) == ("", "alice")
    listed(2, {"hashes": [SECRET], "owner": "alice"})
    assert (admitted(keys), told[0][:2]) == ("alice", ("API key a", True))
    assert SECRET not in told[0][2]
    listed(3)
    assert "incorrect" in admitted(keys)
    assert told[1:] == [("API key a", False, "")]


def head_of(key: str, length: int = 10) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: {length}\r\n"
    ).encode()


def test_a_key_that_is_remembered_with_its_connection_ends_as_any_other() -> None:
    clock = Clock()
    keys, memo = ApiKeys(clock), HeadMemo(parse_request)
    ends = "2023-11-14T23:13:20Z"
    keys.replace([{"a": api_key(expires_at=ends), "b": api_key("sk-bob", owner="bob")}])

    def owner(key: str = SECRET, length: int = 10) -> str:
        head = keys.admit(memo.parse(head_of(key, length)), memo)
        assert (head.length, head.block) == (length, b"")
        assert head.caller is not None
        return head.caller.owner

    assert [owner(), owner(), owner(length=7)] == ["alice"] * 3
    held = memo.admitted
    assert [owner(), owner("sk-bob"), owner()] == ["alice", "bob", "alice"]
    assert held is not None
    assert memo.admitted is not held
    keys.replace([{"a": api_key(expires_at=ends, owner="carol")}])
    assert [owner(), owner()] == ["carol", "carol"]
    clock.now += 3600
    with pytest.raises(GatewayError, match="expired"):
        owner()
    keys.replace([{}])
    with pytest.raises(GatewayError, match="incorrect"):
        owner()


def test_a_head_that_is_too_long_to_remember_is_looked_up_each_time() -> None:
    keys, memo = ApiKeys(Clock()), HeadMemo(parse_request)
    keys.replace([{"a": api_key()}])
    for _ in range(2):
        head = keys.admit(memo.parse(head_of(SECRET) + b"x-long: " + b"x" * 5000 + b"\r\n"), memo)
        assert head.caller is not None
        assert memo.admitted is None


@pytest.mark.parametrize(("limits_user", "asks"), [("key", "alice"), ("header", "bob")])
async def test_turns_and_prompts_are_those_of_whom_the_setting_names(
    lab_of: LabOf, limits_user: str, asks: str
) -> None:
    lab, _ = await guarded(lab_of, api_key(), limits_user=limits_user, block_hash_tenant="user")
    engine = await lab.engine()
    hashes = set()
    body = BODY.replace(b'"hi"', b'"%b"' % (b"long " * 100))
    for headers in ({"user": "bob"}, {"user": "eve"}, {}):
        client = await lab.client()
        client.post(body, authorization=f"Bearer {SECRET}", **headers)
        peer = await engine.accept()
        await peer.request()
        peer.answer(b"{}", "200 OK", "connection: close")
        peer.close()
        await client.response()
        hashes.add(lab.scheduler.requests[-1].block_hashes)
    assert lab.scheduler.requests[0].user == asks
    assert len(hashes) == (1 if limits_user == "key" else 3)
