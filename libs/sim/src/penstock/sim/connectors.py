"""The engine's side of disaggregation: what each KV connector accepts, to the letter, and what it answers.

Formats: vLLM's NIXL connector, both generations of its Mooncake connector, the KVT connector of Llumnix, and
SGLang's bootstrap rooms. What real engines would crash of, or answer with wrong text, is a violation here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from penstock.sim.spec import Role
from penstock.sim.wire import ApiError

ConnectorName = Literal["none", "nixl", "mooncake", "mooncake-llumnix", "kvt", "sglang"]
CONNECTORS: tuple[str, ...] = get_args(ConnectorName)

_HOLD = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_ROOMS = 2**63 - 1


class Violation(ApiError):
    """The gateway broke the protocol."""

    def __init__(self, message: str) -> None:
        super().__init__(400, "BadRequestError", message, "kv_transfer_params")


class Keep(NamedTuple):
    """Compute the prompt and keep it under `key`; `returns` says whether the answer holds parameters,
    `rid` is the gateway's name for the request."""

    key: str
    returns: bool
    rid: str = ""


class Load(NamedTuple):
    """Fetch the prompt's KV from a side channel. With `waits` prefill may still be at work, with `computes`
    it is the one that is asked to compute."""

    host: str
    port: int
    key: str
    engine_id: str = ""
    waits: bool = False
    computes: bool = False


Task = Keep | Load | None


class Asked(NamedTuple):
    """What a connector looks at: a request's body in plain types, its id, and its number in this engine."""

    body: Mapping[str, Any]
    request_id: str
    number: int

    @property
    def params(self) -> Mapping[str, Any] | None:
        params = self.body.get("kv_transfer_params")
        if params is not None and not isinstance(params, Mapping):
            raise Violation("kv_transfer_params is no object")
        return params


class Place(NamedTuple):
    """Where an engine's side channel is, and who the engine is."""

    host: str
    port: int
    engine_id: str
    dp_rank: int = 0
    dp_size: int = 1


@dataclass(frozen=True)
class Connector:
    """One connector in one role."""

    name: ConnectorName
    role: Role

    def task(self, asked: Asked, place: Place) -> Task:
        """What the request asks of the connector. Raises Violation."""
        if self.name == "none":
            return None
        task = _READERS[self.name](asked, place)
        if self.role == "prefill":
            if not isinstance(task, Keep):
                raise Violation("a prefill instance is asked to answer a whole request")
            _one_token(asked.body, streams=self.name == "kvt")
        if self.role == "decode" and isinstance(task, Keep):
            raise Violation("a decode instance is asked to keep a prompt")
        return task

    def parameters(self, keep: Keep, place: Place, blocks: int, tokens: int) -> dict[str, Any] | None:
        """What prefill's answer holds."""
        if not keep.returns:
            return None
        common = {"do_remote_prefill": True, "do_remote_decode": False}
        where = {"remote_host": place.host, "remote_port": place.port}
        if self.name == "mooncake-llumnix":
            return common | where
        return {
            **common,
            "remote_block_ids": [list(range(1, blocks + 1))],
            "remote_engine_id": place.engine_id,
            "remote_request_id": keep.key,
            **where,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": 0,
        }


def _one_token(body: Mapping[str, Any], *, streams: bool) -> None:
    if body.get("max_tokens") != 1 or body.get("max_completion_tokens", 1) != 1:
        raise Violation("prefill computes one token: max_tokens, and max_completion_tokens if given, are 1")
    if present := {"min_tokens", "stream_options"} & body.keys():
        raise Violation(f"prefill's body holds {', '.join(sorted(present))}")
    if body.get("stream") and not streams:
        raise Violation("a streamed answer of prefill never holds the parameters")


def _exactly(params: Mapping[str, Any], fields: Mapping[str, type], **values: object) -> None:
    if params.keys() != fields.keys() | values.keys():
        raise Violation(
            f"kv_transfer_params has {sorted(params)}, not {sorted(fields.keys() | values.keys())}"
        )
    wrong = [name for name, kind in fields.items() if type(params[name]) is not kind]
    wrong += [name for name, value in values.items() if params[name] is not value]
    if wrong:
        raise Violation(f"kv_transfer_params: wrong {', '.join(wrong)}")


def _nixl(asked: Asked, place: Place) -> Task:
    params = asked.params
    if params is None:
        return None
    if params.get("do_remote_decode"):
        if dict(params) != _HOLD:
            raise Violation("kv_transfer_params of prefill is not the one that asks to keep")
        return Keep(f"chatcmpl-{asked.request_id}-{asked.number:08x}", True)
    fields = {"remote_block_ids": list, "remote_engine_id": str, "remote_request_id": str, "remote_host": str}
    numbers = dict.fromkeys(("remote_port", "tp_size", "dcp_size", "pp_size", "remote_num_tokens"), int)
    rest = {"remote_prefill_cached_tokens": int, "transfer_mode": str}
    given = {"do_remote_prefill": True, "do_remote_decode": False, "remote_blocks_expiry_time": None}
    _exactly(params, fields | numbers | rest, **given)
    return Load(
        params["remote_host"], params["remote_port"], params["remote_request_id"], params["remote_engine_id"]
    )


def _mooncake_llumnix(asked: Asked, place: Place) -> Task:
    params = asked.params
    if params is None:
        return None
    if params.get("do_remote_decode"):
        if {name: value for name, value in params.items() if name != "transfer_id"} != _HOLD:
            raise Violation("kv_transfer_params of prefill is not the one that asks to keep")
        return Keep(asked.request_id, True)
    given = {"do_remote_prefill": True, "do_remote_decode": False}
    _exactly(params, {"remote_host": str, "remote_port": int}, **given)
    return Load(params["remote_host"], params["remote_port"], asked.request_id)


def _mooncake(asked: Asked, place: Place) -> Task:
    params = asked.params
    if params is None:
        return None
    transfer = params.get("transfer_id")
    if not isinstance(transfer, str) or not transfer.startswith("xfer-"):
        raise Violation("kv_transfer_params has no transfer_id")
    if params.get("do_remote_decode"):
        others = params.items() - {"do_remote_decode": True, "transfer_id": transfer}.items()
        if any(others_value not in (None, False) for _, others_value in others):
            raise Violation("kv_transfer_params of prefill says more than that it is kept")
        return Keep(transfer, False)
    fields = {"remote_bootstrap_addr": str, "remote_engine_id": str, "transfer_id": str}
    _exactly(params, fields, do_remote_prefill=True, do_remote_decode=False)
    host, _, port = params["remote_bootstrap_addr"].removeprefix("http://").rpartition(":")
    return Load(host.strip("[]"), int(port), transfer, params["remote_engine_id"], waits=True)


def _kvt(asked: Asked, place: Place) -> Task:
    params = asked.params
    if params is None:
        return None
    if "do_remote_decode" in params:
        _exactly(params, {}, do_remote_decode=True)
        return Keep(asked.request_id, False)
    staged = "do_remote_prefill" in params
    fields = {"remote_host": str, "remote_port": int}
    _exactly(params, fields, **({"do_remote_prefill": True} if staged else {}))
    return Load(params["remote_host"], params["remote_port"], asked.request_id, computes=not staged)


def _sglang(asked: Asked, place: Place) -> Task:
    body = asked.body
    names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    if not any(name in body for name in names):
        return None
    host, port, room = (body.get(name) for name in names)
    if type(host) is not str or type(port) is not int or type(room) is not int or not 0 <= room < _ROOMS:
        raise Violation("bootstrap_host, bootstrap_port and bootstrap_room are a string and two integers")
    if not isinstance(body.get("rid"), str):
        raise Violation("rid is missing")
    if (host, port) == (place.host, place.port):
        return Keep(str(room), False, body["rid"])
    if room % place.dp_size != place.dp_rank:
        raise Violation(f"room {room} is not of rank {place.dp_rank} of {place.dp_size}")
    return Load(host, port, str(room), waits=True)


_READERS = {
    "nixl": _nixl,
    "mooncake": _mooncake,
    "mooncake-llumnix": _mooncake_llumnix,
    "kvt": _kvt,
    "sglang": _sglang,
}


def load_failed(why: str) -> ApiError:
    """Decode could not get the prompt's KV."""
    return ApiError(500, "InternalServerError", f"KV load failed: {why}")
