"""The record of what a KV cache holds, and what of it another prompt may take over."""

import numpy as np
import pytest
from coreinfer.runtime.engines.cached import CachedTokens, blocks
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

PACK = FfnChoice(cluster=1)
PROMPT = list(range(100, 150))


def record(*calls: tuple[int, int, FfnChoice]) -> CachedTokens:
    cached = CachedTokens()
    for start, end, choice in calls:
        cached.append(PROMPT[start:end], choice)
    return cached


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 0, []),
        (0, 1, [(0, 1)]),
        (0, 16, [(0, 16)]),
        (0, 33, [(0, 16), (16, 32), (32, 33)]),
        (16, 33, [(16, 32), (32, 33)]),
        (10, 33, [(10, 16), (16, 32), (32, 33)]),
        (40, 40, []),
    ],
)
def test_blocks_end_at_multiples(start: int, end: int, expected: list[tuple[int, int]]) -> None:
    assert list(blocks(start, end, 16)) == expected


def test_the_common_prefix_leaves_a_token_to_read() -> None:
    cached = record((0, 30, DENSE))
    assert cached.num_common(PROMPT) == 30
    assert cached.num_common(PROMPT[:30]) == 29
    assert cached.num_common([*PROMPT[:7], 1, *PROMPT[8:]]) == 7
    assert cached.num_common([1, 2]) == 0
    assert CachedTokens().num_common(PROMPT) == 0
    assert cached.num_common(PROMPT[:1]) == 0


@pytest.mark.parametrize(
    ("calls", "same_calls", "alike"),
    [
        ([(0, 16, DENSE), (16, 32, DENSE), (32, 40, DENSE)], 32, 40),
        # A last block that was not whole was another call.
        ([(0, 16, DENSE), (16, 30, DENSE)], 16, 30),
        ([(0, 16, DENSE), (16, 23, DENSE), (23, 30, DENSE)], 16, 30),
        ([(0, 40, DENSE)], 0, 40),
        ([(0, 50, DENSE)], 0, 48),
        # Tokens read or decoded one by one are rounded in another way.
        ([(0, 16, DENSE), (16, 17, DENSE), (17, 32, DENSE)], 16, 16),
        ([(0, 1, DENSE), (1, 32, DENSE)], 0, 0),
        # Decoded with a pack, or read by one.
        ([(0, 16, DENSE), (16, 32, PACK)], 16, 16),
        ([(0, 16, PACK), (16, 32, DENSE)], 0, 0),
        ([(0, 16, FfnChoice(neuron_ids=(np.arange(3, dtype=np.int32),)))], 0, 0),
        ([], 0, 0),
    ],
)
def test_exact_is_what_the_same_calls_have_read_or_any_alike(
    calls: list[tuple[int, int, FfnChoice]], same_calls: int, alike: int
) -> None:
    assert record(*calls).num_exact(PROMPT, DENSE, 16, alike=False) == same_calls
    assert record(*calls).num_exact(PROMPT, DENSE, 16, alike=True) == alike


def test_exact_ends_before_the_last_block_of_the_prompt() -> None:
    cached = record((0, 16, DENSE), (16, 32, DENSE))
    sizes = (16, 17, 31, 32, 33)
    assert [cached.num_exact(PROMPT[:size], DENSE, 16, alike=False) for size in sizes] == [0, 16, 16, 16, 32]
    assert cached.num_exact([*PROMPT[:20], 1, *PROMPT[21:]], DENSE, 16, alike=False) == 16
    assert cached.num_exact(PROMPT, PACK, 16, alike=False) == 0
    assert record((0, 16, PACK)).num_exact(PROMPT, PACK, 16, alike=False) == 16
    assert cached.num_exact(PROMPT, DENSE, 8, alike=False) == 0


def test_a_call_that_was_cut_is_another_call() -> None:
    cached = record((0, 16, DENSE), (16, 32, DENSE))
    cached.truncate(20)
    assert cached.token_ids == PROMPT[:20]
    assert cached.num_exact(PROMPT, DENSE, 16, alike=False) == 16
    cached.append(PROMPT[20:32], DENSE)
    assert cached.num_exact(PROMPT, DENSE, 16, alike=False) == 16
    cached.truncate(16)
    cached.append(PROMPT[16:32], DENSE)
    assert cached.num_exact(PROMPT, DENSE, 16, alike=False) == 32
    cached.truncate(0)
    assert (cached.token_ids, cached.num_exact(PROMPT, DENSE, 16, alike=False)) == ([], 0)


@pytest.mark.parametrize(
    ("num_read", "num_prompt", "expected"),
    [
        # One token would be left, which is not read alone when all are.
        (40, 41, 39),
        (40, 42, 40),
        # The last of a block, likewise, whatever comes behind it.
        (31, 50, 30),
        (30, 50, 30),
        (32, 50, 32),
        # The first of a block that is the last of the prompt is read alone either way.
        (32, 33, 32),
        (31, 33, 30),
        (0, 1, 0),
    ],
)
def test_what_is_left_is_read_as_if_all_were(num_read: int, num_prompt: int, expected: int) -> None:
    cached = record((0, num_read, DENSE)) if num_read else CachedTokens()
    start = cached.num_exact(PROMPT[:num_prompt], DENSE, 16, alike=True)
    assert start == expected
    alone = {end for begin, end in blocks(0, num_prompt, 16) if end - begin == 1}
    assert {end for begin, end in blocks(start, num_prompt, 16) if end - begin == 1} == alone


def test_what_is_left_of_a_cut_call_counts_where_calls_are_alike() -> None:
    cached = record((0, 16, DENSE), (16, 32, DENSE))
    cached.truncate(17)
    assert cached.num_exact(PROMPT, DENSE, 16, alike=True) == 17
    cached.append(PROMPT[17:18], DENSE)
    assert cached.num_exact(PROMPT, DENSE, 16, alike=True) == 17
