"""How the KV-cache events of engines are bridged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KvPolicy:
    """`ports` are those of instances whose labels name none; with `blocks`, prompts are hashed by tokens, and
    of at most `most_blocks` per instance."""

    ports: tuple[int, int] = (0, 0)
    blocks: bool = False
    block_size: int = 16
    secret: str = ""
    most_blocks: int = 262_144
