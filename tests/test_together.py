"""Texts that are read in a batch give what each of them gives alone, in every family."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.quality.together import batch_texts, dense_logits, narrow_logits, parts_of

from .model_factory import FAMILIES, VOCABULARY
from .test_evaluating import load

LENGTHS = (41, 9, 33, 16, 2)
"""Of texts, shorter and longer than the sliding windows of the tiny models."""


def draw(lengths: Sequence[int]) -> list[list[int]]:
    generator = np.random.default_rng(6)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load(request.param)


@torch.inference_mode()
def test_a_batch_gives_what_each_text_gives_alone(loaded: LoadedModel) -> None:
    texts = draw(LENGTHS)
    starts = [len(text) // 2 for text in texts]
    together = dense_logits(loaded, texts, starts)
    decoded = narrow_logits(
        loaded, [text[start:] for text, start in zip(texts, starts, strict=True)], [halves for _, halves in together]
    )
    for text, start, (dense, _), narrow in zip(texts, starts, together, decoded, strict=True):
        whole = loaded.model(torch.tensor([text]), use_cache=False).logits[0, start:-1]
        assert dense.shape == narrow.shape == whole.shape
        torch.testing.assert_close(dense, whole, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(narrow, whole, atol=2e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_text_without_a_first_half_shares_a_batch() -> None:
    loaded = load("llama")
    texts = [*draw([1, 12])]
    (_, none), (dense, halves) = dense_logits(loaded, texts, [0, 6])
    first, second = narrow_logits(loaded, [texts[0], texts[1][6:]], [none, halves])
    assert first.shape == (0, loaded.record.vocab_size)
    torch.testing.assert_close(second, dense, atol=2e-4, rtol=1e-3)


def test_batches_are_of_one_cluster_and_of_like_length() -> None:
    lengths, labels = [700, 10, 300, 20, 500, 30, 2000], np.array([0, 1, 0, 1, 0, 1, 1])
    batches = batch_texts(lengths, labels, vocab_size=1000)
    # 300 and 500 are not alike: a fifth would be padding.
    assert batches == [(2,), (4,), (0,), (1, 3, 5), (6,)]
    assert batch_texts([300, 310, 330], None, vocab_size=1000) == [(0, 1, 2)]
    assert batch_texts(lengths, None, vocab_size=1 << 25) == [(1,), (3,), (5,), (2,), (4,), (0,), (6,)]
    assert batch_texts([], None, vocab_size=10) == []
    assert [*parts_of(batches, {4, 5, 6})] == [(4,), (5,), (6,)]
