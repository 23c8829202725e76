"""Log-probabilities of tokens, against torch's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.runtime.decoding.choosing import log_softmax

from .engine_inputs import PROMPT, SAMPLED


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    # An int8 head, which the native engine screens where only the likeliest token matters.
    return runtime.load(tiny_bundle("llama", quantize="int8"), engine=request.param, threads=1)


def test_log_softmax_is_that_of_torch() -> None:
    logits = np.random.default_rng(0).normal(0, 20, 1000).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=0).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-9)
    assert np.isfinite(log_softmax(np.array([1e30, -1e30], dtype=np.float32))[0])


@pytest.mark.parametrize("sampled", [False, True])
def test_logprobs_are_of_the_models_own_distribution(sampled: bool, engine: runtime.Engine) -> None:
    options = {**SAMPLED, "seed": 3} if sampled else {}
    tokens = list(engine.stream(PROMPT, raw=True, mode="dense", max_new_tokens=8, logprobs=5, **options))
    decoder = engine.decoder
    decoder.truncate(0)
    # As the engine reads: what is read in a block may be rounded in another way than what is decoded.
    steps = [engine.tokenizer.encode(PROMPT).ids, *([token.token_id] for token in tokens[:-1])]
    rows = [decoder.forward(ids)[-1] for ids in steps]
    for token, row in zip(tokens, rows, strict=True):
        expected = torch.log_softmax(torch.from_numpy(row).double(), dim=0).numpy()
        assert token.logprob == pytest.approx(expected[token.token_id], abs=1e-4)
        got = [top.logprob for top in token.top_logprobs]
        assert got == sorted(got, reverse=True)
        np.testing.assert_allclose(got, np.sort(expected)[::-1][:5], atol=1e-4)
        assert all(top.text == engine.tokenizer.decode([top.token_id]) for top in token.top_logprobs)
        if not sampled:
            assert token.top_logprobs[0].token_id == token.token_id
            assert token.top_logprobs[0].logprob == token.logprob


def test_none_are_given_unasked(engine: runtime.Engine) -> None:
    got = engine.generate(PROMPT, raw=True, max_new_tokens=4)
    assert (got.logprobs, got.top_logprobs) == ((), ())
    chosen = engine.generate(PROMPT, raw=True, max_new_tokens=4, logprobs=0)
    assert chosen.token_ids == got.token_ids
    assert len(chosen.logprobs) == 4
    assert chosen.top_logprobs == ((),) * 4
    assert all(logprob < 0 for logprob in chosen.logprobs)


def test_more_than_there_are_is_all(engine: runtime.Engine) -> None:
    (token,) = engine.stream(PROMPT, raw=True, max_new_tokens=1, logprobs=10**6)
    vocabulary = engine.manifest.model.vocab_size
    assert sorted(top.token_id for top in token.top_logprobs) == list(range(vocabulary))
    assert sum(np.exp(top.logprob) for top in token.top_logprobs) == pytest.approx(1)
