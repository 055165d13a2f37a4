"""What is read of request bodies, and what the gateway has to know of a request."""

from __future__ import annotations

import msgspec

EMPTY = msgspec.Raw()
# Without a tokenizer: English text and code run at about four bytes a token.
BYTES_PER_TOKEN = 4


class InferenceRequest(msgspec.Struct, frozen=True, gc=False):
    """What the gateway has to know of a request; `prompt` is the raw JSON that the prompt consists of."""

    model: str
    stream: bool
    prompt: bytes
    max_tokens: int
    cache_salt: str = ""
    # Whose instances are wanted, and what the instance gets instead of a body that says so, or says
    # what no client may say.
    owner: str = ""
    body: bytes = b""

    @property
    def prompt_tokens(self) -> int:
        """An estimate from the prompt's bytes."""
        return len(self.prompt) // BYTES_PER_TOKEN


class Body(msgspec.Struct, gc=False):
    """The top level of a body; prompts stay as they came."""

    model: str
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    cache_salt: str | None = None
    tools: msgspec.Raw = EMPTY
    system: msgspec.Raw = EMPTY
    messages: msgspec.Raw = EMPTY
    prompt: msgspec.Raw = EMPTY
    input: msgspec.Raw = EMPTY
    documents: msgspec.Raw = EMPTY
    owned_by: msgspec.Raw = EMPTY
    engine: msgspec.Raw = EMPTY
    inference_server: msgspec.Raw = EMPTY
    # Those of FORBIDDEN, which are looked for and not read, and the object that may hold some.
    kv_transfer_params: msgspec.Raw = EMPTY
    bootstrap_host: msgspec.Raw = EMPTY
    bootstrap_port: msgspec.Raw = EMPTY
    bootstrap_room: msgspec.Raw = EMPTY
    disagg_prefill_dp_rank: msgspec.Raw = EMPTY
    disagg_prefill_resp: msgspec.Raw = EMPTY
    disaggregated_params: msgspec.Raw = EMPTY
    bootstrap_pair_key: msgspec.Raw = EMPTY
    vllm_xargs: msgspec.Raw = EMPTY


class Named(msgspec.Struct):
    """The model alone."""

    model: msgspec.Raw
