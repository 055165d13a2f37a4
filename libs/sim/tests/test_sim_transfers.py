"""KV transfers between simulated engines: what each connector takes, keeps, hands over and refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession

from penstock.sim import text
from penstock.sim.connectors import ConnectorName
from penstock.sim.http import Profile
from penstock.sim.instance import Instance
from penstock.sim.spec import EngineSpec, Role
from penstock.sim.transfers import TransferSpec

Json = dict[str, Any]
PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
HOLD: Json = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Lab:
    """A prefill and a decode engine, and a gateway's hands."""

    def __init__(self, prefill: Instance, decode: Instance, session: ClientSession) -> None:
        self.prefill, self.decode, self._session = prefill, decode, session

    async def ask(self, engine: Instance, request_id: str = "r1", **fields: Any) -> tuple[int, Json]:
        body = {"model": text.DEFAULT_MODEL, "prompt": PROMPT, "max_tokens": 8, **fields}
        body = {name: value for name, value in body.items() if value is not ...}
        headers = {"x-request-id": request_id}
        async with self._session.post(f"{engine.url}/v1/completions", json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def transfers(self, engine: Instance) -> Json:
        async with self._session.get(f"{engine.url}/sim/state?requests=0") as answer:
            return dict((await answer.json())["transfers"])

    async def side_channel(self) -> tuple[str, int]:
        host, port = (await self.transfers(self.prefill))["side_channel"].split(":")
        return host, int(port)

    async def engine_id(self) -> str:
        host, port = await self.side_channel()
        async with self._session.get(f"http://{host}:{port}/query") as answer:
            return str((await answer.json())["0"]["engine_id"])

    async def abort(self, rid: str) -> None:
        async with self._session.post(f"{self.prefill.url}/abort_request", json={"rid": rid}) as answer:
            assert answer.status == 200

    async def clean(self) -> None:
        """Nothing is kept, and nobody broke the protocol."""
        for engine in (self.prefill, self.decode):
            state = await self.transfers(engine)
            assert (state["held"], state["blocks_kept"], state["violations"]) == (0, 0, [])


@asynccontextmanager
async def lab(connector: ConnectorName, **changes: Any) -> AsyncIterator[Lab]:
    def engine(role: Role) -> Instance:
        spec = EngineSpec(role=role, prefill_tokens_per_s=1e9, decode_step_s=0.0, decode_step_per_seq_s=0.0)
        return Instance(spec, Profile(), transfer=TransferSpec(connector, **changes))

    async with engine("prefill") as prefill, engine("decode") as decode, ClientSession() as session:
        yield Lab(prefill, decode, session)


def said(body: Json) -> str:
    return str(body["choices"][0]["text"])


async def test_nixl_hands_a_prompt_over_once() -> None:
    async with lab("nixl") as one:
        status, first = await one.ask(one.prefill, max_tokens=1, stream=False, kv_transfer_params=HOLD)
        assert status == 200
        params = first["kv_transfer_params"]
        assert (await one.transfers(one.prefill))["held"] == 1
        status, answer = await one.ask(one.decode, kv_transfer_params=params)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 8
        await one.clean()
        # A second use would be answered with wrong text by a real engine.
        status, _ = await one.ask(one.decode, kv_transfer_params=params)
        assert status == 500
        assert (await one.transfers(one.decode))["violations_total"] == 1


async def test_both_instances_answer_as_one_would() -> None:
    async with lab("nixl") as one:
        _, first = await one.ask(one.prefill, max_tokens=1, stream=False, kv_transfer_params=HOLD)
        _, divided = await one.ask(one.decode, kv_transfer_params=first["kv_transfer_params"])
        _, whole = await one.ask(one.decode)
        assert said(divided) == said(whole)
        assert divided["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


async def test_another_prompt_does_not_get_it() -> None:
    async with lab("nixl") as one:
        _, first = await one.ask(one.prefill, max_tokens=1, stream=False, kv_transfer_params=HOLD)
        status, _ = await one.ask(
            one.decode, prompt=PROMPT + "!", kv_transfer_params=first["kv_transfer_params"]
        )
        assert status == 500
        assert (await one.transfers(one.prefill))["held"] == 1


async def test_what_nobody_fetches_ends_with_its_lease() -> None:
    async with lab("nixl", lease_s=0.05) as one:
        await one.ask(one.prefill, max_tokens=1, stream=False, kv_transfer_params=HOLD)
        async with asyncio.timeout(30):
            while (state := await one.transfers(one.prefill))["expired"] != 1:  # noqa: ASYNC110  # another loop's clock
                await asyncio.sleep(0.01)
        assert (state["held"], state["blocks_kept"], state["overdue"]) == (0, 0, 0)


async def test_mooncake_of_the_older_generation_pairs_by_the_request_id() -> None:
    async with lab("mooncake-llumnix") as one:
        hold = {**HOLD, "transfer_id": "xfer-1"}
        _, first = await one.ask(one.prefill, max_tokens=1, stream=False, kv_transfer_params=hold)
        assert first["kv_transfer_params"].keys() == {
            "do_remote_prefill",
            "do_remote_decode",
            "remote_host",
            "remote_port",
        }
        status, _ = await one.ask(one.decode, "another", kv_transfer_params=first["kv_transfer_params"])
        assert status == 500
        status, _ = await one.ask(one.decode, kv_transfer_params=first["kv_transfer_params"])
        assert status == 200


async def test_mooncake_of_the_current_generation_waits_for_prefill() -> None:
    async with lab("mooncake") as one:
        host, port = await one.side_channel()
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": f"http://{host}:{port}",
            "remote_engine_id": await one.engine_id(),
            "transfer_id": "xfer-7",
        }
        decode = asyncio.create_task(one.ask(one.decode, kv_transfer_params=params))
        _, first = await one.ask(
            one.prefill, max_tokens=1, stream=False, kv_transfer_params={**HOLD, "transfer_id": "xfer-7"}
        )
        assert first["kv_transfer_params"] is None
        assert (await decode)[0] == 200
        await one.clean()
        status, _ = await one.ask(one.decode, kv_transfer_params={**params, "remote_engine_id": "other"})
        assert status == 500


async def test_mooncake_gives_up_on_a_prefill_that_never_comes() -> None:
    async with lab("mooncake", wait_s=0.05) as one:
        host, port = await one.side_channel()
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": f"http://{host}:{port}",
            "remote_engine_id": await one.engine_id(),
            "transfer_id": "xfer-8",
        }
        assert (await one.ask(one.decode, kv_transfer_params=params))[0] == 500
        await one.clean()


async def test_kvt_in_one_request_computes_at_prefill() -> None:
    async with lab("kvt") as one:
        host, port = await one.side_channel()
        where = {"remote_host": host, "remote_port": port}
        status, answer = await one.ask(one.decode, kv_transfer_params=where)
        assert status == 200
        _, whole = await one.ask(one.decode)
        assert said(answer) == said(whole)
        assert (await one.transfers(one.prefill))["fetched"] == 1
        await one.clean()


async def test_kvt_in_two_requests() -> None:
    async with lab("kvt") as one:
        host, port = await one.side_channel()
        await one.ask(one.prefill, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
        params = {"remote_host": host, "remote_port": port, "do_remote_prefill": True}
        assert (await one.ask(one.decode, kv_transfer_params=params))[0] == 200
        await one.clean()


async def test_sglang_meets_in_a_room() -> None:
    async with lab("sglang", dp_rank=0, dp_size=1) as one:
        host, port = await one.side_channel()
        room: Json = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": 2**62, "rid": "x"}
        decode = asyncio.create_task(one.ask(one.decode, **room))
        assert (await one.ask(one.prefill, max_tokens=1, **room))[0] == 200
        assert (await decode)[0] == 200
        await one.clean()


async def test_sglang_is_told_to_abort_what_it_keeps() -> None:
    async with lab("sglang") as one:
        host, port = await one.side_channel()
        room: Json = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": 5, "rid": "x"}
        await one.ask(one.prefill, max_tokens=1, **room)
        assert (await one.transfers(one.prefill))["held"] == 1
        await one.abort("x")
        state = await one.transfers(one.prefill)
        assert (state["held"], state["blocks_kept"], state["cancelled"]) == (0, 0, 1)


REFUSED: list[tuple[ConnectorName, Role, Json]] = [
    ("nixl", "prefill", {}),
    ("nixl", "prefill", {"max_tokens": 2, "kv_transfer_params": HOLD}),
    ("nixl", "prefill", {"max_tokens": 1, "stream": True, "kv_transfer_params": HOLD}),
    ("nixl", "prefill", {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": HOLD}),
    ("nixl", "prefill", {"max_tokens": 1, "stream_options": {}, "kv_transfer_params": HOLD}),
    ("nixl", "prefill", {"max_tokens": 1, "max_completion_tokens": 8, "kv_transfer_params": HOLD}),
    ("nixl", "prefill", {"max_tokens": 1, "kv_transfer_params": {**HOLD, "remote_host": "h"}}),
    ("nixl", "prefill", {"max_tokens": 1, "n": 2, "kv_transfer_params": HOLD}),
    ("nixl", "decode", {"kv_transfer_params": HOLD}),
    ("nixl", "decode", {"kv_transfer_params": {"do_remote_prefill": True}}),
    ("nixl", "decode", {"kv_transfer_params": 3}),
    ("mooncake", "prefill", {"max_tokens": 1, "kv_transfer_params": HOLD}),
    ("mooncake-llumnix", "prefill", {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}),
    ("kvt", "prefill", {"max_tokens": 1, "kv_transfer_params": HOLD}),
    ("kvt", "decode", {"kv_transfer_params": {"remote_host": "h", "remote_port": "1"}}),
    (
        "kvt",
        "decode",
        {"kv_transfer_params": {"remote_host": "h", "remote_port": 1, "do_remote_decode": True}},
    ),
    ("sglang", "decode", {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": "1", "rid": "x"}),
    ("sglang", "decode", {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 1}),
    ("sglang", "decode", {"bootstrap_host": "h", "bootstrap_room": 1, "rid": "x"}),
]


@pytest.mark.parametrize(("connector", "role", "fields"), REFUSED)
async def test_a_wrong_word_is_a_violation(connector: ConnectorName, role: Role, fields: Json) -> None:
    async with lab(connector) as one:
        engine = one.prefill if role == "prefill" else one.decode
        status, _ = await one.ask(engine, **fields)
        assert status == 400
        state = await one.transfers(engine)
        assert (state["violations_total"], state["held"], state["blocks_kept"]) == (1, 0, 0)
