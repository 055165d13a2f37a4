"""One generation request, from its parsed body to its last byte, with the fault that strikes it."""

import asyncio
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from penstock.sim import sabotage, text
from penstock.sim.blocks import chain_hashes
from penstock.sim.connectors import Keep, Load, Task
from penstock.sim.faults import MID_STREAM, Fault
from penstock.sim.replies import Reply, Usage
from penstock.sim.runner import EngineRunner
from penstock.sim.spec import DoesNotFit, EngineRequest, QueueFull, TokenEvent
from penstock.sim.text import Answer
from penstock.sim.transfers import Transfers
from penstock.sim.wire import ApiError, bad_request

_SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8"}


class Exchange:
    """Submits the sequences of a call and writes what comes out of them.

    `close` is the one way out: it aborts in the engine what has not finished there.
    """

    def __init__(
        self,
        reply: Reply,
        runner: EngineRunner,
        engine_id: str,
        fault: Fault | None,
        transfers: Transfers | None = None,
        task: Task = None,
    ) -> None:
        """`task` is what the connector behind `transfers` has to do with the request's KV."""
        self._transfers, self._task = transfers, task
        self._imported_tokens = 0
        self._keeping = isinstance(task, Keep)
        self._reply = reply
        self._runner = runner
        self._fault = fault
        self._ids = [f"{engine_id}-{choice}" for choice in range(len(reply.answers))]
        self._generated = [0] * len(self._ids)
        self._sent = [0] * len(self._ids)
        self._cached_tokens = [0] * len(self._ids)
        self._unfinished = len(self._ids)
        # Progress since it was last looked at, and who waits for it.
        self._progressed = False
        self._waiter: asyncio.Future[None] | None = None

    async def run(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises ApiError if the engine does not take the request, and what `sabotage` raises."""
        if self._transfers is not None and isinstance(self._task, Load):
            self._imported_tokens = await self._transfers.load(self._task, self._reply.call)
        self._submit()
        if self._fault is not None and self._fault.kind == "hang-before-headers":
            await sabotage.until_gone()
        return await (self._stream(request) if self._reply.call.stream else self._whole(request))

    def close(self) -> None:
        for engine_id in self._ids:
            self._runner.abort(engine_id)
            if self._keeping:
                # The client left between the last token and the answer.
                self._runner.let_go(engine_id)

    def _submit(self) -> None:
        call, block_size = self._reply.call, self._runner.engine.spec.block_size
        for choice, (prompt, answer) in enumerate(call.sequences):
            tokens = prompt + answer.text.encode() if answer.tokens else prompt
            request = EngineRequest(
                request_id=self._ids[choice],
                prompt_tokens=text.count(prompt),
                output_tokens=answer.tokens,
                block_hashes=chain_hashes(tokens, text.TOKEN_BYTES, block_size, call.cache_root),
                finish_reason=answer.finish_reason,
                stall_after=self._stall_after(answer),
                tokens=tokens,
                cache_root=call.cache_root,
                imported_tokens=self._imported_tokens,
                keeps=isinstance(self._task, Keep),
            )
            try:
                self._runner.submit(request, partial(self._on_event, choice))
            except DoesNotFit as exc:
                raise bad_request(str(exc), "input_tokens") from exc
            except QueueFull as exc:
                raise ApiError(503, "ServiceUnavailableError", str(exc)) from exc

    def _stall_after(self, answer: Answer) -> int | None:
        """A hang is the engine's: it goes on holding the batch place and the blocks of the request."""
        if self._fault is None:
            return None
        if self._fault.kind == "hang-before-headers":
            return 0
        mid = self._fault.kind == "hang-mid-stream" and self._reply.call.stream
        return min(self._fault.tokens, answer.tokens) if mid else None

    def _on_event(self, choice: int, event: TokenEvent) -> None:
        self._generated[choice] = event.generated
        self._cached_tokens[choice] = event.cached_tokens
        self._unfinished -= event.finished
        # Whoever answers in one piece is woken once, for the last token.
        if self._unfinished and not self._reply.call.stream:
            return
        self._progressed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _progress(self) -> None:
        if not self._progressed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._progressed = False

    @property
    def _mid_fault(self) -> Fault | None:
        return self._fault if self._fault is not None and self._fault.kind in MID_STREAM else None

    async def _whole(self, request: web.BaseRequest) -> web.StreamResponse:
        while self._unfinished:
            await self._progress()
        body = self._reply.whole(self._usage())
        if self._transfers is not None:
            body = body[:-1] + b',"kv_transfer_params":' + msgspec.json.encode(self._kept()) + b"}"
        if self._mid_fault is None:
            return web.Response(body=body, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if self._mid_fault.kind == "garbage-mid-stream":
            response.enable_chunked_encoding()
        else:
            response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        await sabotage.mid_body(request, self._mid_fault)

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self._mid_fault
        targets = [answer.tokens for answer in self._reply.answers]
        if fault is not None:
            targets = [min(target, fault.tokens) for target in targets]
        response = web.StreamResponse(headers=_SSE_HEADERS)
        # Headers go out here, tokens when there are any, as with a real engine.
        await response.prepare(request)
        data = self._fresh(targets)
        while self._sent != targets:
            if data:
                await response.write(data)
            await self._progress()
            data = self._fresh(targets)
        if fault is not None:
            await response.write(data)
            await sabotage.mid_body(request, fault)
        self._kept()
        await response.write_eof(data + self._reply.closing(self._usage()))
        return response

    def _kept(self) -> dict[str, Any] | None:
        """A prompt that is kept is there for others from now on."""
        if self._transfers is None or not isinstance(self._task, Keep):
            return None
        self._keeping = False
        reason = self._reply.answers[0].finish_reason
        return self._transfers.kept(self._task, self._ids[0], self._reply.call, reason)

    def _fresh(self, targets: list[int]) -> bytes:
        """Events of the tokens that are generated and not sent, at most `targets` tokens a choice."""
        events = []
        if not any(self._sent) and any(self._generated):
            events.append(self._reply.opening(self._usage()))
        for choice, answer in enumerate(self._reply.answers):
            upto = min(self._generated[choice], targets[choice])
            for index in range(self._sent[choice], upto):
                piece = answer.text[index * text.TOKEN_BYTES : (index + 1) * text.TOKEN_BYTES]
                last = index + 1 == answer.tokens
                events.append(self._reply.token(choice, piece, answer.finish_reason if last else None))
            self._sent[choice] = upto
        return b"".join(events)

    def _usage(self) -> Usage:
        call = self._reply.call
        # Choices of one prompt share it; it is counted once.
        prompts = range(0, len(call.sequences), call.choices)
        return Usage(
            prompt=sum(text.count(call.sequences[i].prompt) for i in prompts),
            completion=sum(answer.tokens for answer in self._reply.answers),
            cached=sum(self._cached_tokens[i] for i in prompts),
        )
