"""Rows of several sequences in one pass: to the bit what each token gives alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .engine_inputs import MAX_POSITIONS, with_room
from .model_factory import FAMILIES, VOCABULARY

IDS = np.random.default_rng(7).integers(3, VOCABULARY, 220).tolist()
# Rows of each sequence in one pass, after so many cached tokens: windows are 16, blocks of positions too.
MIXED = {5: 3, 17: 1, 0: 2, 31: 5, 150: 8}


def one_by_one(decoder: Any, start: int, count: int) -> Any:
    """Logits of tokens decoded one at a time after `start` tokens read as a prompt."""
    decoder.truncate(0)
    if start:
        decoder.forward(IDS[:start])
    return np.concatenate([decoder.forward([token_id]) for token_id in IDS[start : start + count]])


def started(decoder: Any) -> list[int]:
    """A sequence for each of MIXED, its prompt read."""
    sequences = []
    for start in MIXED:
        sequences.append(decoder.add_sequence())
        decoder.select(sequences[-1])
        if start:
            decoder.forward(IDS[:start])
    decoder.select(0)
    return sequences


def mixed_rows(sequences: list[int]) -> list[tuple[int, int]]:
    """(sequence, token) of all rows, dealt out so that no sequence's rows lie together."""
    left = [list(IDS[start : start + count]) for start, count in MIXED.items()]
    rows = []
    while any(left):
        rows += [(sequence, ids.pop(0)) for sequence, ids in zip(sequences, left, strict=True) if ids]
    return rows


def check_mixed(decoder: NativeDecoder) -> None:
    expected = [one_by_one(decoder, start, count) for start, count in MIXED.items()]
    sequences = started(decoder)
    rows = mixed_rows(sequences)
    got = decoder.forward_rows([sequence for sequence, _ in rows], [token_id for _, token_id in rows])
    for sequence, (start, count), logits in zip(sequences, MIXED.items(), expected, strict=True):
        np.testing.assert_array_equal(got[[row for row, (owner, _) in enumerate(rows) if owner == sequence]], logits)
        # What they leave in the cache is the same too.
        decoder.select(sequence)
        assert decoder.num_cached == start + count
        after = decoder.forward([IDS[0]])
        decoder.select(0)
        one_by_one(decoder, start, count)
        np.testing.assert_array_equal(decoder.forward([IDS[0]]), after)
        decoder.drop_sequence(sequence)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_to_the_bit_what_single_tokens_give(
    family: str, threads: int, tiny_bundle: Callable[..., Path]
) -> None:
    check_mixed(NativeDecoder(open_bundle(tiny_bundle(family)), threads=threads))


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
def test_rows_are_exact_in_every_format_by_all_kernels(kind: str, isa: str, tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("gemma3", quantize=kind)), threads=3, isa=isa)
    for choice in (DENSE, FfnChoice(cluster=1)):
        decoder.use(choice)
        check_mixed(decoder)


def check_beside(decoder: NativeDecoder, block_tokens: int) -> None:
    """A block and rows in one pass leave and return what each does by itself."""
    decoder.truncate(0)
    decoder.forward(IDS[:30])
    block = decoder.forward(IDS[30 : 30 + block_tokens])
    after = decoder.forward([IDS[0]])
    decoder.truncate(0)
    expected = [one_by_one(decoder, start, 2) for start in MIXED]
    decoder.truncate(0)
    decoder.forward(IDS[:30])
    sequences = started(decoder)
    for last_logits, first in ((False, 30), (True, 30 + block_tokens // 2)):
        ids = IDS[first : first + block_tokens // 2]
        step = int(last_logits)
        got = decoder.forward_beside(ids, sequences, [IDS[start + step] for start in MIXED], last_logits=last_logits)
        np.testing.assert_array_equal(got[step:], np.stack([logits[step] for logits in expected]))
    np.testing.assert_array_equal(got[:1], block)
    np.testing.assert_array_equal(decoder.forward([IDS[0]]), after)
    for sequence, start in zip(sequences, MIXED, strict=True):
        decoder.select(sequence)
        assert decoder.num_cached == start + 2
        assert decoder.cached.token_ids == IDS[: start + 2]
        decoder.select(0)
        decoder.drop_sequence(sequence)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_and_rows_in_one_pass_know_nothing_of_each_other(family: str, tiny_bundle: Callable[..., Path]) -> None:
    check_beside(NativeDecoder(open_bundle(tiny_bundle(family, quantize="int4")), threads=2), 40)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
def test_a_block_beside_rows_is_exact_in_every_format_by_all_kernels(
    kind: str, isa: str, tiny_bundle: Callable[..., Path]
) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("gemma3", quantize=kind)), threads=3, isa=isa)
    for choice in (DENSE, FfnChoice(cluster=1)):
        decoder.use(choice)
        check_beside(decoder, 80)


def test_a_block_too_large_for_one_pass_with_rows(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(with_room(open_bundle(tiny_bundle("qwen3", quantize="int4"))), threads=2)
    other = decoder.add_sequence()
    ids = (IDS + IDS)[: _native.BLOCK_TOKENS]
    block, row = decoder.forward(ids), one_by_one(decoder, 0, 1)
    for last_logits in (True, False):
        decoder.truncate(0)
        got = decoder.forward_beside(ids, [other], IDS[:1], last_logits=last_logits)
        np.testing.assert_array_equal(got, np.concatenate([block, row]) if last_logits else row)
        decoder.select(other)
        decoder.truncate(0)
        decoder.select(0)


def test_wrong_blocks_beside_rows_are_refused(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)
    other = decoder.add_sequence()
    decoder.forward(IDS[:220])
    for block_ids, sequences, ids, reason in (
        ([5], [other], [5], "at least two"),
        ([5] * 37, [other], [5], "at most 36 more"),
        ([5] * 36, [0], [5], "at most 36 more"),
        ([5, VOCABULARY], [other], [5], "token id"),
        ([5, 5], [other + 1], [5], "sequence"),
        ([5, 5], [other], [], "one a token"),
        ([5, 5], [], [], "at least one"),
    ):
        with pytest.raises(ConfigError, match=reason):
            decoder.forward_beside(block_ids, sequences, ids, last_logits=True)
    assert decoder.num_cached == MAX_POSITIONS - 36


@pytest.mark.parametrize("head", ["int8", "bf16", "int4"])
def test_rows_are_exact_with_any_head(head: str, tiny_bundle: Callable[..., Path]) -> None:
    check_mixed(
        NativeDecoder(open_bundle(tiny_bundle("opt-post-norm", quantize="int4", head_quantize=head)), threads=2)
    )


def test_a_screened_head_chooses_the_token_of_exact_rows(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama", quantize="int4")), threads=2)
    rows = decoder.forward_rows([0] * 100, IDS[:100])
    decoder.truncate(0)
    for token_id, row in zip(IDS[:100], rows, strict=True):
        assert decoder.forward([token_id], greedy=True)[0].argmax() == row.argmax()


def check_screened(screened: Any, exact: Any) -> None:
    """The likeliest tokens and their logits are to the bit the same, others are approximate."""
    likeliest = exact.argmax(axis=-1)
    np.testing.assert_array_equal(screened.argmax(axis=-1), likeliest)
    np.testing.assert_array_equal(screened.max(axis=-1), exact.max(axis=-1))
    for row, logits in zip(screened, exact, strict=True):
        assert (row != logits).any()


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("num_rows", [2, 7, 32])
def test_rows_are_screened_together(num_rows: int, isa: str, tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama", quantize="int4")), threads=3, isa=isa)
    exact = decoder.forward_rows([0] * num_rows, IDS[:num_rows])
    decoder.truncate(0)
    check_screened(decoder.forward_rows([0] * num_rows, IDS[:num_rows], greedy=True), exact)


def test_a_prompts_end_is_screened_beside_rows(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama", quantize="int4")), threads=2)
    other = decoder.add_sequence()

    def read(*, greedy: bool) -> Any:
        for number in (other, 0):
            decoder.select(number)
            decoder.truncate(0)
        return decoder.forward_beside(IDS[:20], [other] * 3, IDS[:3], last_logits=True, greedy=greedy)

    check_screened(read(greedy=True), read(greedy=False))


def test_more_rows_than_a_block_are_exact(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(with_room(open_bundle(tiny_bundle("qwen3", quantize="int4"))), threads=2)
    ids = IDS + IDS[::-1]
    assert len(ids) > _native.BLOCK_TOKENS
    expected = np.concatenate([decoder.forward([token_id]) for token_id in ids])
    decoder.truncate(0)
    np.testing.assert_array_equal(decoder.forward_rows([0] * len(ids), ids), expected)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_a_prompt_longer_than_a_block_is_read_as_in_pieces(kind: str, tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(with_room(open_bundle(tiny_bundle("gemma3", quantize=kind))), threads=2)
    ids = IDS + IDS[::-1]
    assert len(ids) > _native.BLOCK_TOKENS
    whole = decoder.forward(ids, all_logits=True)
    decoder.truncate(0)
    pieces = [decoder.forward(ids[start : start + 110], all_logits=True) for start in range(0, len(ids), 110)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-4 * np.abs(whole).max())


def test_prompts_are_attended_to_in_another_order(tiny_bundle: Callable[..., Path]) -> None:
    """If the faster way were exact too, there would be no need for two."""
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=3)
    rows = decoder.forward_rows([0] * 100, IDS[:100])
    decoder.truncate(0)
    block = decoder.forward(IDS[:100], all_logits=True)
    np.testing.assert_allclose(block, rows, atol=2e-2 * np.abs(rows).max())
    assert not np.array_equal(block, rows)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_sequences_do_not_know_of_each_other(engine: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("gemma3"))
    decoder: Any = (
        NativeDecoder(bundle, threads=2) if engine == "native" else TorchDecoder(bundle, device="cpu", dtype="float32")
    )
    expected = one_by_one(decoder, 20, 4)
    other = decoder.add_sequence()
    decoder.select(other)
    decoder.forward(IDS[60:100])
    decoder.select(0)
    decoder.truncate(20)
    got = [decoder.forward_rows([0, other], [token_id, IDS[7]])[0] for token_id in IDS[20:24]]
    np.testing.assert_allclose(np.stack(got), expected, atol=0 if engine == "native" else 1e-4)
    assert (decoder.sequence, decoder.num_cached) == (0, 24)
    decoder.select(other)
    assert decoder.num_cached == 44
    decoder.drop_sequence(other)
    assert (decoder.sequence, decoder.num_cached) == (0, 24)
    # Whoever comes next begins with nothing, under whatever number.
    decoder.select(decoder.add_sequence())
    assert decoder.num_cached == 0


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_wrong_sequences_are_refused(engine: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    decoder: Any = (
        NativeDecoder(bundle, threads=1) if engine == "native" else TorchDecoder(bundle, device="cpu", dtype="float32")
    )
    number = decoder.add_sequence()
    decoder.drop_sequence(number)
    for wrong in (number, -1, 9):
        for call in (decoder.select, decoder.drop_sequence, lambda n: decoder.forward_rows([0, n], [5, 5])):
            with pytest.raises(ConfigError, match="sequence"):
                call(wrong)
    with pytest.raises(ConfigError, match="sequence"):
        decoder.drop_sequence(0)
    assert decoder.sequence == 0


def test_rows_are_checked_before_any_is_read(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)
    other = decoder.add_sequence()
    decoder.forward(IDS[:220])
    for sequences, ids, reason in (
        ([0, other], [5], "one a token"),
        ([0, other], [5, VOCABULARY], "token id"),
        ([], [], "at least one"),
        ([other] + [0] * 37, [5] * 38, "at most 36 more in the KV cache, got 37"),
    ):
        with pytest.raises(ConfigError, match=reason):
            decoder.forward_rows(sequences, ids)
    assert decoder.num_cached == MAX_POSITIONS - 36
    decoder.select(other)
    assert decoder.num_cached == 0


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_a_token_beyond_a_whole_block_is_like_any_other_of_its_call(
    isa: str, kind: str, tiny_bundle: Callable[..., Path]
) -> None:
    """A call of one token more than a block: that token is not read as one that comes alone."""
    decoder = NativeDecoder(with_room(open_bundle(tiny_bundle("llama", quantize=kind))), threads=2, isa=isa)
    ids = IDS + IDS[::-1]
    expected = decoder.forward(ids, all_logits=True)
    decoder.truncate(0)
    first = decoder.forward(ids[: _native.BLOCK_TOKENS + 1], all_logits=True)
    rest = decoder.forward(ids[_native.BLOCK_TOKENS + 1 :], all_logits=True)
    np.testing.assert_array_equal(np.concatenate([first, rest]), expected)
