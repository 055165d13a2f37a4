"""Answers in the forms of OpenAI's Responses API and Anthropic's Messages API: one choice, named events."""

from typing import Any

import msgspec

from penstock.sim.replies import Reply, Usage
from penstock.sim.wire import Call


def _event(data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(data["type"]).encode(), msgspec.json.encode(data))


class MessagesReply(Reply):
    id_prefix = "msg_"

    def whole(self, usage: Usage) -> bytes:
        (answer,) = self.answers
        content = [{"type": "text", "text": answer.text}]
        return msgspec.json.encode(self._message(content, self._stop_reason(), usage, usage.completion))

    def opening(self, usage: Usage) -> bytes:
        start = {"type": "message_start", "message": self._message([], None, usage, 0)}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event(start) + _event(block)

    def token(self, choice: int, piece: str, finish_reason: str | None) -> bytes:
        delta = {"type": "text_delta", "text": piece}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, usage: Usage) -> bytes:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": None}
        figures = {"input_tokens": usage.prompt, "output_tokens": usage.completion}
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": delta, "usage": figures})
            + _event({"type": "message_stop"})
        )

    def _stop_reason(self) -> str:
        return "max_tokens" if self.answers[0].finish_reason == "length" else "end_turn"

    def _message(
        self, content: list[dict[str, Any]], stop_reason: str | None, usage: Usage, output_tokens: int
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.call.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {"input_tokens": usage.prompt, "output_tokens": output_tokens},
        }


class ResponsesReply(Reply):
    """Events are numbered in order, so a reply is streamed once."""

    id_prefix = "resp_"

    def __init__(self, call: Call, request_id: str, created: int) -> None:
        super().__init__(call, request_id, created)
        self._item_id = f"msg_{request_id}"
        self._number = 0

    def whole(self, usage: Usage) -> bytes:
        return msgspec.json.encode(self._response(self._status(), [self._item(self._status())], usage))

    def opening(self, usage: Usage) -> bytes:
        response = self._response("in_progress", [], None)
        item = {**self._item("in_progress"), "content": []}
        return (
            self._numbered("response.created", response=response)
            + self._numbered("response.in_progress", response=response)
            + self._numbered("response.output_item.added", output_index=0, item=item)
            + self._in_part("response.content_part.added", part=self._part(""))
        )

    def token(self, choice: int, piece: str, finish_reason: str | None) -> bytes:
        return self._in_part("response.output_text.delta", delta=piece, logprobs=[])

    def closing(self, usage: Usage) -> bytes:
        text, item = self.answers[0].text, self._item(self._status())
        response = self._response(self._status(), [item], usage)
        return (
            self._in_part("response.output_text.done", text=text, logprobs=[])
            + self._in_part("response.content_part.done", part=self._part(text))
            + self._numbered("response.output_item.done", output_index=0, item=item)
            + self._numbered(f"response.{self._status()}", response=response)
        )

    def _numbered(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return _event({"type": kind, "sequence_number": number, **fields})

    def _in_part(self, kind: str, **fields: Any) -> bytes:
        return self._numbered(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _status(self) -> str:
        return "incomplete" if self.answers[0].finish_reason == "length" else "completed"

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, status: str) -> dict[str, Any]:
        content = [self._part(self.answers[0].text)]
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        figures = usage and {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self.call.model,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": None,
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": self.call.body.tools or [],
            "usage": figures,
        }
