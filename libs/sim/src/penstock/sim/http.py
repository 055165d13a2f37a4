"""The HTTP interface of one simulated engine: OpenAI-compatible, vLLM's errors, control endpoints."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
from aiohttp import web

from penstock.sim import agent_replies, faults, metrics, replies, sabotage, text, wire
from penstock.sim.exchange import Exchange
from penstock.sim.faults import SEVERING, Fault, FaultBook, FaultError
from penstock.sim.kv_publisher import KvPublisher
from penstock.sim.metrics import MetricsStyle
from penstock.sim.replies import Reply
from penstock.sim.runner import EngineRunner
from penstock.sim.transfers import Transfers
from penstock.sim.wire import ApiError, Call, Catalogue

_REMEMBERED_REQUESTS = 1000
_REMEMBERED_BODY_BYTES = 65_536

Handler = Callable[[web.BaseRequest, bytes], web.Response]


@dataclass(frozen=True)
class Profile:
    """How an engine presents itself. `models`: names of the base model, the first one labels the metrics."""

    models: tuple[str, ...] = (text.DEFAULT_MODEL,)
    lora_adapters: tuple[str, ...] = ()
    owned_by: str = "penstock"
    max_model_len: int = 32_768
    max_body_bytes: int = 67_108_864
    metrics_style: MetricsStyle = "vllm"


class _Seen(NamedTuple):
    """A generation request as it arrived; `body` is its beginning."""

    request_id: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    body_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "path": self.path,
            "headers": {name.lower(): _printable(value) for name, value in self.headers.items()},
            "body": self.body.decode("utf-8", "replace"),
            "body_bytes": self.body_bytes,
        }


_GENERATION: dict[str, tuple[Callable[[bytes, Catalogue], Call], type[Reply]]] = {
    "/v1/chat/completions": (wire.chat, replies.ChatReply),
    "/v1/completions": (wire.completion, replies.CompletionReply),
    "/v1/responses": (wire.responses, agent_replies.ResponsesReply),
    "/v1/messages": (wire.messages, agent_replies.MessagesReply),
    "/v1/embeddings": (wire.embedding, replies.EmbeddingReply),
    "/v1/rerank": (wire.rerank, replies.RerankReply),
}


class EngineServer:
    """Request handler of one engine, to be served by `aiohttp.web.Server` with handler cancellation."""

    def __init__(
        self,
        runner: EngineRunner,
        profile: Profile,
        refuse: Callable[[float], None],
        kv_publisher: KvPublisher | None = None,
        transfers: Transfers | None = None,
    ) -> None:
        """`refuse(seconds)` closes the listening socket for that long."""
        self._kv_publisher, self._transfers = kv_publisher, transfers
        self._runner = runner
        self._profile = profile
        self._refuse = refuse
        adapters = dict.fromkeys(profile.models, "") | {name: name for name in profile.lora_adapters}
        self._catalogue = Catalogue(adapters, profile.max_model_len)
        self._faults = FaultBook()
        self._seen: deque[_Seen] = deque(maxlen=_REMEMBERED_REQUESTS)
        self._seen_total = 0
        self._open = 0
        self._aborted = 0
        self._started = int(time.time())
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": lambda *_: web.Response()},
            "/version": {"GET": lambda *_: _json({"version": version("penstock-sim")})},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
            "/sim/kv-events": {"POST": self._spoil_kv_events},
            "/abort_request": {"POST": self._abort},
            "/sim/state": {"GET": self._state},
            "/sim/fault": {"POST": self._arm, "DELETE": self._disarm},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("expect", "").lower() == "100-continue" and request.transport is not None:
            # aiohttp's low-level server leaves this to its handler.
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if request.path in _GENERATION and request.method == "POST":
                return await self._generate(request)
            return await self._answer(request)
        except ConnectionError:
            # The client has left, so nobody reads this.
            return web.Response()
        except web.RequestPayloadError as exc:
            error = wire.bad_request(str(exc))
        except web.HTTPRequestEntityTooLarge:
            error = ApiError(413, "BadRequestError", "The request body is too large.")
        except FaultError as exc:
            error = wire.bad_request(str(exc))
        except ApiError as exc:
            error = exc
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return web.Response(
            status=error.status, body=error.body(), headers=headers, content_type="application/json"
        )

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        path = request.path
        methods = self._routes.get(path)
        if methods is None and path not in _GENERATION:
            raise ApiError(404, "NotFoundError", "Not Found")
        handler = methods.get(request.method) if methods else None
        if handler is None:
            raise ApiError(405, "MethodNotAllowedError", "Method Not Allowed")
        fault = None if path.startswith("/sim/") else self._fault(request, generates=False)
        if fault is not None:
            await sabotage.before_headers(request, fault)
        return handler(request, await request.read())

    async def _generate(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        request_id = _printable(request.headers.get("x-request-id") or uuid4().hex)
        beginning = body[:_REMEMBERED_BODY_BYTES]
        self._seen.append(_Seen(request_id, request.path, request.headers, beginning, len(body)))
        self._seen_total += 1
        fault = self._fault(request, generates=True)
        engine_id = str(self._seen_total)
        self._open += 1
        try:
            if fault is not None and fault.kind != "hang-before-headers":
                await sabotage.before_headers(request, fault)
            parse, reply_type = _GENERATION[request.path]
            call = parse(body, self._catalogue)
            reply = reply_type(call, request_id, int(time.time()))
            transfers, task = self._transfers, None
            if transfers is not None:
                task = transfers.read(body, request_id, self._seen_total, call)
            exchange = Exchange(reply, self._runner, engine_id, fault, transfers, task)
            try:
                return await exchange.run(request)
            finally:
                exchange.close()
        except (asyncio.CancelledError, ConnectionError):
            self._aborted += fault is None or fault.kind not in SEVERING
            raise
        finally:
            self._open -= 1

    def _fault(self, request: web.BaseRequest, *, generates: bool) -> Fault | None:
        header = request.headers.get("x-sim-fault")
        if header is not None:
            return faults.parse_header(_printable(header))
        return self._faults.take(request.path, generates=generates)

    def _metrics(self, _: web.BaseRequest, __: bytes) -> web.Response:
        expired = self._transfers.expired if self._transfers is not None else None
        style = self._profile.metrics_style
        page = metrics.render(self._runner.engine, self._profile.models[0], style, expired)
        return web.Response(body=page.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    def _models(self, _: web.BaseRequest, __: bytes) -> web.Response:
        base = self._profile.models[0]
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": self._profile.owned_by,
                "root": adapter or base,
                "parent": base if adapter else None,
                "max_model_len": None if adapter else self._profile.max_model_len,
            }
            for name, adapter in self._catalogue.adapters.items()
        ]
        return _json({"object": "list", "data": cards})

    def _tokenize(self, _: web.BaseRequest, body: bytes) -> web.Response:
        wanted = wire.decode(body, wire.TokenizeBody)
        self._catalogue.resolve(wanted.model)
        ids = text.token_ids(wire.tokens_of(wanted))
        return _json({"count": len(ids), "max_model_len": self._profile.max_model_len, "tokens": ids})

    def _detokenize(self, _: web.BaseRequest, body: bytes) -> web.Response:
        wanted = wire.decode(body, wire.DetokenizeBody)
        self._catalogue.resolve(wanted.model)
        return _json({"prompt": text.detokenize(wire.tokens(wanted.tokens, "tokens"))})

    def _state(self, request: web.BaseRequest, _: bytes) -> web.Response:
        """`?requests=N` shows the last N requests only; rendering all of them is not cheap."""
        engine = self._runner.engine
        shown = request.query.get("requests", str(_REMEMBERED_REQUESTS))
        if not (shown.isascii() and shown.isdigit() and len(shown) < 10):
            raise wire.bad_request("requests is a number below a billion", "requests")
        skipped = max(len(self._seen) - int(shown), 0)
        return _json(
            {
                "role": engine.spec.role,
                "running": engine.running,
                "waiting": engine.waiting,
                "kv_blocks_used": engine.kv_blocks_used,
                "kv_blocks_total": engine.spec.kv_blocks,
                "transfers": self._transfers.state() if self._transfers else None,
                "open": self._open,
                "aborted": self._aborted,
                "requests_total": self._seen_total,
                "requests": [seen.as_dict() for seen in islice(self._seen, skipped, None)],
            }
        )

    def _abort(self, _: web.BaseRequest, body: bytes) -> web.Response:
        """SGLang's way to end a request from outside: here, what is kept for it."""
        wanted = wire.decode(body, wire.AbortBody)
        if self._transfers is not None:
            self._transfers.abort(wanted.rid)
        return web.Response()

    def _arm(self, _: web.BaseRequest, body: bytes) -> web.Response:
        fault = faults.parse_body(body)
        if fault.kind == "refuse":
            self._refuse(fault.ms / 1000)
        else:
            self._faults.arm(fault)
        return _json(fault)

    def _reset_prefix_cache(self, _: web.BaseRequest, __: bytes) -> web.Response:
        # vLLM's path, which takes no body and answers without one.
        if not self._runner.engine.reset_prefix_cache():
            raise ApiError(400, "BadRequestError", "The prefix cache is in use.")
        return web.Response()

    def _spoil_kv_events(self, _: web.BaseRequest, body: bytes) -> web.Response:
        wanted = wire.decode(body, wire.KvEventsBody)
        publisher = self._kv_publisher
        if publisher is None:
            raise ApiError(404, "NotFoundError", "This engine publishes no KV-cache events.")
        if wanted.restart:
            if not self._runner.engine.reset_prefix_cache():
                raise ApiError(400, "BadRequestError", "The prefix cache is in use.")
            publisher.restart()
        publisher.lose(wanted.lose, for_good=wanted.for_good)
        return web.Response(status=204)

    def _disarm(self, _: web.BaseRequest, __: bytes) -> web.Response:
        self._faults.clear()
        return web.Response(status=204)


def _printable(header: str) -> str:
    """Without the lone surrogates that stand for bytes which are no UTF-8."""
    return header.encode("utf-8", "replace").decode()


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
