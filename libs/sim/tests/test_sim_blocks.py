"""Blocks: sharing by hash, reference counts, eviction."""

import pytest

from penstock.sim.blocks import BlockPool, chain_hashes


def fill(pool: BlockPool, hashes: list[int]) -> None:
    assert pool.allocate(len(hashes))
    for block_hash in hashes:
        pool.publish(block_hash)


def test_equal_prefixes_have_equal_hashes_up_to_the_first_difference() -> None:
    first = chain_hashes(b"aaaabbbbcccc", 4, 1)
    second = chain_hashes(b"aaaaXbbbcccc", 4, 1)
    assert len(first) == 3
    assert first[0] == second[0]
    # Equal tokens under different parents are different blocks.
    assert not set(first[1:]) & set(second[1:])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_only_full_blocks_have_a_hash(tokens: int, blocks: int) -> None:
    assert len(chain_hashes(b"abcd" * tokens, 4, 4)) == blocks


def test_a_root_separates_caches() -> None:
    assert chain_hashes(b"abcd", 4, 1, "lora") != chain_hashes(b"abcd", 4, 1)


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3)
    assert not pool.allocate(2)
    assert pool.used == 3
    assert pool.allocate(1)


def test_released_blocks_stay_as_cache_and_do_not_count_as_used() -> None:
    pool = BlockPool(4)
    fill(pool, [1, 2])
    pool.release([1, 2], private=0)
    assert (pool.used, pool.cached, pool.match([1, 2, 3], 3)) == (0, 2, 2)


def test_a_match_ends_at_the_limit_and_at_the_first_block_that_is_absent() -> None:
    pool = BlockPool(4)
    fill(pool, [1, 2, 3])
    assert pool.match([1, 2, 3], 2) == 2
    assert pool.match([1, 9, 3], 3) == 1


def test_a_chain_is_evicted_from_its_end_and_the_oldest_first() -> None:
    pool = BlockPool(4)
    fill(pool, [1, 2])
    fill(pool, [3, 4])
    pool.release([1, 2], private=0)
    pool.release([3, 4], private=0)
    assert pool.allocate(1)
    assert pool.match([1, 2], 2) == 1
    assert pool.allocate(1)
    assert (pool.match([1, 2], 2), pool.match([3, 4], 2)) == (0, 2)


def test_a_block_in_use_is_never_evicted() -> None:
    pool = BlockPool(3)
    fill(pool, [1, 2])
    pool.acquire([1])
    pool.release([1, 2], private=0)
    assert pool.allocate(2)
    assert not pool.allocate(1)
    assert pool.match([1, 2], 2) == 1


def test_using_a_cached_block_makes_it_the_last_to_be_evicted() -> None:
    pool = BlockPool(2)
    fill(pool, [1])
    fill(pool, [2])
    pool.release([1], private=0)
    pool.release([2], private=0)
    pool.acquire([1])
    pool.release([1], private=0)
    assert pool.allocate(1)
    assert (pool.match([1], 1), pool.match([2], 1)) == (1, 0)


def test_publishing_a_hash_that_is_present_gives_the_private_copy_back() -> None:
    pool = BlockPool(3)
    fill(pool, [1])
    assert pool.allocate(1)
    pool.publish(1)
    assert pool.used == 1
    pool.release([1], private=0)
    pool.release([1], private=0)
    assert pool.used == 0
    assert pool.allocate(3)
