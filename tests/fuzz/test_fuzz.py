"""Mutated corpora through the parsers of hostile input.

A few thousand mutants from a fixed seed; with PENSTOCK_FUZZ_SECONDS, that many seconds for each target
from a seed that is told. An input that fails is saved in the target's corpus, which every run begins with.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from fuzz import bodies, engines
from fuzz.clients import Reader, check
from fuzz.mutation import CORPUS, corpus, mutants, pieces

SECONDS = float(os.environ.get("PENSTOCK_FUZZ_SECONDS", "0"))
MUTANTS = 2000
SEED = random.SystemRandom().randrange(2**32) if SECONDS else 1


def inputs(target: str, rng: random.Random) -> Iterator[bytes]:
    """The corpus, then its mutants until the bound."""
    seeds = corpus(target)
    yield from seeds
    if not SECONDS:
        yield from itertools.islice(mutants(seeds, rng), MUTANTS)
        return
    end = time.monotonic() + SECONDS
    yield from itertools.takewhile(lambda _: time.monotonic() < end, mutants(seeds, rng))


async def run(target: str, one: Callable[[bytes, random.Random], Awaitable[None] | None]) -> None:
    """Saves an input that fails and tells it."""
    rng = random.Random(SEED)
    for count, data in enumerate(inputs(target, rng)):
        try:
            outcome = one(data, rng)
            if outcome is not None:
                await outcome
        except Exception:
            path = CORPUS / target / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            print(f"seed {SEED}, input {count}, saved as {path.name}: {data!r}")
            raise


@pytest.mark.timeout(180 + SECONDS)
async def test_requests_are_read_as_an_independent_parser_reads_them() -> None:
    reader = Reader()
    await run("requests", lambda data, rng: check(reader, data, pieces(data, rng)))


@pytest.mark.timeout(180 + SECONDS)
async def test_responses_are_read_as_an_independent_parser_reads_them() -> None:
    await run("responses", lambda data, rng: engines.check(data, pieces(data, rng)))


@pytest.mark.timeout(180 + SECONDS)
async def test_bodies_are_refused_with_a_typed_error_or_read_as_an_instance_reads_them() -> None:
    await run("bodies", lambda data, rng: bodies.check_body(data))


@pytest.mark.timeout(180 + SECONDS)
async def test_messages_are_refused_with_a_typed_error_or_survive_the_way_there_and_back() -> None:
    await run("messages", lambda data, rng: bodies.check_message(data))
