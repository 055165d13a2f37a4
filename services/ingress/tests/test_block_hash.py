"""Equal beginnings of prompts give equal beginnings of hashes, at a cost that no prompt can drive up."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.block_hash import root_seed
from penstock.ingress.block_hash import (
    DIGEST_BYTES,
    LONG_STRING_BYTES,
    MAX_HASHES,
    RUN_BLOCKS,
    chain,
    condense,
)

SEED = root_seed("secret", "model")


def hashes(prompt: bytes, seed: int = SEED, block_bytes: int = 16) -> list[int]:
    packed = chain(prompt, seed, block_bytes)
    return list(struct.unpack(f"<{len(packed) // 8}Q", packed))


def offsets(count: int, block_bytes: int) -> list[int]:
    """Where each of the first blocks ends, by the rule of the design."""
    ends, end = [], 0
    for block in range(count):
        end += block_bytes << (block // RUN_BLOCKS)
        ends.append(end)
    return ends


@given(st.binary(max_size=4000), st.binary(max_size=3000), st.binary(max_size=3000))
def test_a_common_beginning_of_bytes_is_a_common_beginning_of_hashes(
    common: bytes, first: bytes, second: bytes
) -> None:
    shared = hashes(common)
    assert hashes(common + first)[: len(shared)] == shared == hashes(common + second)[: len(shared)]


@given(st.binary(min_size=16, max_size=4000), st.integers(min_value=0))
def test_one_changed_byte_changes_its_block_and_all_after_it_and_none_before(prompt: bytes, at: int) -> None:
    at %= len(prompt)
    changed = prompt[:at] + bytes([prompt[at] ^ 1]) + prompt[at + 1 :]
    for end, before, after in zip(offsets(MAX_HASHES, 16), hashes(prompt), hashes(changed), strict=False):
        assert (before == after) == (end <= at)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (16 * 64, 64)])
def test_only_whole_blocks_are_hashed(size: int, count: int) -> None:
    assert len(hashes(b"x" * size)) == count


@pytest.mark.parametrize("blocks", [63, 64, 65, 127, 128, 129, 200, 511, 512])
def test_blocks_double_after_every_run(blocks: int) -> None:
    prompt = os.urandom(offsets(blocks, 16)[-1])
    assert (len(hashes(prompt)), len(hashes(prompt[:-1]))) == (blocks, blocks - 1)


def test_there_are_at_most_512_hashes_and_they_cover_4_mib_at_256_bytes() -> None:
    assert offsets(MAX_HASHES, 256)[-1] == 64 * 256 * 255
    assert len(chain(bytes(offsets(MAX_HASHES, 256)[-1]), SEED, 256)) == MAX_HASHES * 8
    assert len(chain(bytes(20_000_000), SEED, 256)) == MAX_HASHES * 8


def test_hashes_are_packed_little_endian() -> None:
    assert chain(b"x" * 16, SEED, 16) == hashes(b"x" * 16)[0].to_bytes(8, "little")


def test_another_model_salt_or_secret_shares_no_hash() -> None:
    prompt = os.urandom(2000)
    seeds = [
        SEED,
        root_seed("secret", "other"),
        root_seed("other", "model"),
        root_seed("secret", "model", "salt"),
        root_seed("", "secretmodel"),
        root_seed("secretmodel", ""),
        root_seed("secret", "model\0salt"),
        root_seed("secret", "", "model"),
    ]
    chains = [hashes(prompt, seed) for seed in seeds]
    assert len({value for values in chains for value in values}) == sum(map(len, chains))


URI = b"data:image/png;base64," + b"iVBORw0KGgo+/=" * 300
LONG = b"All work and no play makes a dull boy. " * 2000
assert len(LONG) > LONG_STRING_BYTES


@pytest.mark.parametrize("text", [URI, LONG], ids=["data URI", "long string"])
def test_a_data_uri_or_long_string_enters_as_one_digest(text: bytes) -> None:
    before, after = b'[{"role":"user","content":"', b'"},{"role":"user","content":"hello"}]'
    condensed = condense(before + text + after)
    assert condensed.startswith(before)
    assert condensed.endswith(after)
    assert len(condensed) == len(before) + DIGEST_BYTES + len(after)
    changed = condense(before + text[:-1] + b"A" + after)
    assert condensed != changed
    assert condense(before + text + b'"}]').startswith(condensed[: len(before) + DIGEST_BYTES])


@pytest.mark.parametrize("text", [URI, LONG], ids=["data URI", "long string"])
@pytest.mark.parametrize("shift", [0, 1, 200, 255])
def test_a_prompt_that_is_little_more_than_a_digest_has_a_hash_that_depends_on_it(
    text: bytes, shift: int
) -> None:
    prompts = [b'"' + b"s" * shift + b'","' + content + b'"' for content in (text, text[:-1] + b"A")]
    chains = [hashes(condense(prompt), block_bytes=256) for prompt in prompts]
    assert chains[0]
    assert chains[0][-1] != chains[1][-1]


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(b'"data:image/png;base64,' + b"A" * 4095 + b'"', id="small image"),
        pytest.param(b'"data:image/png,' + b"A" * 9000 + b'"', id="not base64"),
        pytest.param(b'"' + b"x" * (LONG_STRING_BYTES - 1) + b'"', id="a byte under the bound"),
        pytest.param(b'"' + b"x" * 2 * LONG_STRING_BYTES, id="not closed"),
        pytest.param(b"x" * 2 * LONG_STRING_BYTES + b'"', id="not opened"),
        pytest.param(b'["", "a"]' * LONG_STRING_BYTES, id="many short strings"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_everything_else_stays_as_it_is(prompt: bytes) -> None:
    assert condense(prompt) == prompt


_runs = st.integers(0, 4) | st.sampled_from([32_000, 33_000, 65_535, 65_536, 65_537, 98_304, 140_000])


@given(st.lists(_runs, min_size=1, max_size=8))
def test_every_string_over_the_bound_is_found_wherever_it_lies(lengths: list[int]) -> None:
    prompt = b'"' + b'"'.join(b"x" * length for length in lengths) + b'"'
    expected = 1 + sum(1 + (DIGEST_BYTES if length >= LONG_STRING_BYTES else length) for length in lengths)
    assert len(condense(prompt)) == expected


@given(st.lists(_runs, min_size=1, max_size=5), st.lists(_runs, max_size=3))
def test_a_common_beginning_of_strings_is_a_common_beginning_of_hashes(
    common: list[int], more: list[int]
) -> None:
    first = b'"' + b'"'.join(b"x" * length for length in common) + b'"'
    longer = first + b'"'.join(b"y" * length for length in more) + b'"'
    shared = hashes(condense(first), block_bytes=256)
    assert hashes(condense(longer), block_bytes=256)[: len(shared)] == shared


@given(
    st.lists(st.sampled_from([0, 1, 1500, 4095, 4096, 5000]), min_size=1, max_size=4), st.integers(0, 70_000)
)
def test_images_stay_a_common_beginning_when_a_conversation_grows(sizes: list[int], more: int) -> None:
    first = b"".join(b'"data:image/png;base64,' + b"A" * size + b'",' for size in sizes)
    shared = hashes(condense(first), block_bytes=256)
    assert hashes(condense(first + b'"' + b"x" * more + b'"'), block_bytes=256)[: len(shared)] == shared


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(b'["' + b'\\"' * 65_000 + b'"]', id="escaped quotes"),
        pytest.param(b'["' + b'\\"' * 65_000 + b'","' + b"\\\\" * 65_000 + b'"]' * 15, id="escapes"),
        pytest.param(b'"",' * 1_300_000, id="empty strings"),
        pytest.param(b'"' * 4_000_000, id="quotes"),
        pytest.param((b'"' + b"x" * 32_768) * 120, id="strings just too short"),
        pytest.param(b"data:a/a;base64," * 250_000, id="beginnings of data URIs"),
        pytest.param(b"data:" + b"a" * 4_000_000, id="a media type without end"),
        pytest.param(b"data:a/" * 500_000 + b";base64,", id="media types without data"),
        pytest.param((b"data:a/a;base64," + b"A" * 4095 + b'"') * 1_000, id="images just too small"),
        pytest.param(b'"' + b"x" * 4_000_000 + b'"', id="one string"),
    ],
)
@pytest.mark.timeout(20)
def test_a_hostile_prompt_of_4_mib_is_hashed_at_once(prompt: bytes) -> None:
    # Each takes a few ms; a pattern that tries every quote as a beginning takes minutes.
    assert len(chain(condense(prompt), SEED, 256)) <= MAX_HASHES * 8
