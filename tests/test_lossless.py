"""Mode lossless: the dense model's tokens, whatever the pack drafts."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.shared.beginnings import text_ids
from coreinfer.runtime.decoding.drafting import DraftLength
from coreinfer.runtime.decoding.sampling import Sampler, SamplingParams, distribution
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.scheduling.ffn_switch import FfnSwitch
from coreinfer.runtime.scheduling.speculative import draft_round
from scipy.stats import chisquare

from .engine_inputs import DIALOGUE, MAX_POSITIONS, PROMPT
from .model_factory import corpus_texts

ENGINES: dict[str, dict[str, Any]] = {
    "native": {"engine": "native", "threads": 1},
    # k tokens in one call round otherwise than one by one: in float32 by far less than the likeliest tokens differ.
    "torch": {"engine": "torch", "device": "cpu", "dtype": "float32"},
}
Bundles = Callable[..., Path]


def load(bundle: Path, engine: str = "native") -> runtime.Engine:
    return runtime.load(bundle, **ENGINES[engine])


def fixed_length(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftLength, "next", lambda self, limit: min(length, limit))


def check_equal(engine: runtime.Engine, prompt: Any, **options: Any) -> runtime.Generation:
    """Generate dense and lossless; returns the latter."""
    options["raw"] = isinstance(prompt, str)
    dense = engine.generate(prompt, mode="dense", **options)
    dense_cached = list(engine.decoder.cached.token_ids)
    got: runtime.Generation = engine.generate(prompt, mode="lossless", **options)
    assert (got.token_ids, got.text, got.finish_reason) == (dense.token_ids, dense.text, dense.finish_reason)
    assert (got.mode, dense.drafting) == ("lossless", None)
    assert got.drafting is not None
    # Nothing of a draft is left.
    assert engine.decoder.cached.token_ids == dense_cached
    assert engine.decoder.num_cached == len(dense_cached) == got.num_prompt_tokens + len(got.token_ids) - 1
    return got


@pytest.mark.parametrize(("engine", "num_prompts"), [("native", 50), ("torch", 10)])
def test_prompts_of_128_tokens_are_dense_token_for_token(
    engine: str, num_prompts: int, tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Left to itself, drafting turns itself off after the first of these: it does not pay on a tiny model.
    fixed_length(5, monkeypatch)
    loaded = load(tiny_bundle("llama", quantize="int4" if engine == "native" else "bf16"), engine)
    prompts = [text[: 40 + 2 * number] for number, text in enumerate(corpus_texts()[:num_prompts])]
    drafted = [check_equal(loaded, prompt, max_new_tokens=128).drafting for prompt in prompts]
    assert sum(drafting.num_accepted for drafting in drafted if drafting) > 100
    assert sum(drafting.num_tried - drafting.num_accepted for drafting in drafted if drafting) > 100


@pytest.mark.parametrize("length", [1, 4, 15])
@pytest.mark.parametrize("family", ["opt", "gemma3", "qwen3"])
def test_any_draft_length_gives_the_dense_tokens(
    family: str, length: int, tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_length(length, monkeypatch)
    loaded = load(tiny_bundle(family))
    got = check_equal(loaded, DIALOGUE, max_new_tokens=60)
    assert got.drafting is not None
    assert 0 < got.drafting.mean_length <= length


SCHEMA = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 9}


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7, "logit_bias": {5: 4, 9: -100}},
        {"logprobs": 2},
        {"drift_tokens": 8},
        {"json_schema": SCHEMA},
    ],
)
def test_greedy_options_give_the_dense_tokens(options: Any, tiny_bundle: Bundles) -> None:
    loaded = load(tiny_bundle("llama"))
    got = check_equal(loaded, PROMPT, max_new_tokens=100, **options)
    if "logprobs" in options:
        assert got.logprobs == loaded.generate(PROMPT, raw=True, mode="dense", max_new_tokens=100, **options).logprobs


def test_what_stays_in_the_cache_is_the_dense_models(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_length(5, monkeypatch)
    loaded = load(tiny_bundle("gemma3", quantize="int4"))
    logits = {}
    for mode in ("dense", "lossless"):
        loaded.generate(PROMPT, raw=True, mode=mode, max_new_tokens=60)
        loaded.decoder.use(DENSE)
        logits[mode] = loaded.decoder.forward([9])
    np.testing.assert_array_equal(logits["lossless"], logits["dense"])


# Ends inside a draft: a pack that keeps all neurons drafts what the dense model says.


@pytest.fixture
def agreeing(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> runtime.Engine:
    fixed_length(7, monkeypatch)
    return load(tiny_bundle("llama", keep=1.0))


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 8, 9, 10, 12, 40])
def test_max_new_tokens_inside_a_draft(max_new_tokens: int, agreeing: runtime.Engine) -> None:
    got = check_equal(agreeing, PROMPT, max_new_tokens=max_new_tokens)
    assert (len(got.token_ids), got.finish_reason) == (max_new_tokens, "length")
    assert got.drafting is not None
    assert got.drafting.num_accepted == got.drafting.num_tried
    assert got.drafting.num_drafted < max_new_tokens


@pytest.mark.parametrize("place", [0, 1, 5, 8, 9, 20])
def test_end_of_text_inside_a_draft(place: int, agreeing: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = agreeing.generate(PROMPT, raw=True, mode="dense", max_new_tokens=40).token_ids
    monkeypatch.setattr(agreeing.loaded.prompts, "eos_token_ids", frozenset({token_ids[place]}))
    got = check_equal(agreeing, PROMPT, max_new_tokens=40)
    assert (got.finish_reason, got.token_ids) == ("stop", token_ids[: token_ids.index(token_ids[place]) + 1])


def test_stop_strings_inside_a_draft(agreeing: runtime.Engine) -> None:
    text = agreeing.generate(PROMPT, raw=True, mode="dense", max_new_tokens=40).text
    for start in range(4, min(len(text), 40), 6):
        got = check_equal(agreeing, PROMPT, max_new_tokens=40, stop=[text[start : start + 3]])
        assert got.finish_reason == "stop"


@pytest.mark.parametrize("room", [1, 2, 5, 8, 9, 13])
def test_context_end_inside_a_draft(room: int, agreeing: runtime.Engine) -> None:
    words = " ".join(corpus_texts())
    assert encoded(agreeing, words) > MAX_POSITIONS
    size = next(n for n in range(len(words)) if encoded(agreeing, words[:n]) == MAX_POSITIONS - room)
    got = check_equal(agreeing, words[:size], max_new_tokens=100)
    assert (len(got.token_ids), got.finish_reason) == (room, "length")


def encoded(engine: runtime.Engine, text: str) -> int:
    return len(text_ids(engine.tokenizer, text))


def test_closing_a_stream_early_leaves_no_draft(agreeing: runtime.Engine) -> None:
    with closing(agreeing.stream(PROMPT, raw=True, mode="lossless", max_new_tokens=40)) as stream:
        tokens = list(itertools.islice(stream, 13))
    assert agreeing.decoder.num_cached == tokens[-1].num_prompt_tokens + 12


def test_turns_of_a_conversation(tiny_bundle: Bundles) -> None:
    loaded = load(tiny_bundle("llama"))
    options = runtime.GenerationOptions(max_new_tokens=30)
    texts = []
    for mode in ("dense", "lossless"):
        conversation = loaded.conversation()
        answers = [
            conversation.send(text, replace(options, mode=mode))
            for text in ("Speak of soup.", "And of ships?", "And of law?")
        ]
        assert all(answer.num_cached_tokens for answer in answers[1:])
        texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1]


def test_lossless_needs_the_dense_ffn(tiny_bundle: Bundles) -> None:
    loaded = load(tiny_bundle("llama", dense=False))
    with pytest.raises(ConfigError, match="mode 'lossless' needs the dense FFN"):
        loaded.generate(PROMPT, raw=True, mode="lossless")


# Sampling keeps the dense model's distribution.

PARAMS = SamplingParams(temperature=1.2, top_k=4, top_p=0.97, min_p=0.02, repetition_penalty=1.2, seed=0)
LENGTH = 2
NUM_TOKENS = LENGTH + 2  # the prompt's own, two drafted, and the dense model's
NUM_SAMPLES = 3000


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Bundles) -> NativeDecoder:
    return NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)


PROMPT_IDS = list(range(40, 60))


def dense_probabilities(decoder: NativeDecoder) -> dict[tuple[int, ...], float]:
    """Probability of every text of NUM_TOKENS tokens."""
    decoder.use(DENSE)

    def texts(head: tuple[int, ...], probability: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(head) == NUM_TOKENS:
            yield head, probability
            return
        decoder.truncate(0)
        logits = decoder.forward(PROMPT_IDS)
        for token_id in head:
            logits = decoder.forward([token_id])
        next_ones = distribution(logits[-1], PARAMS, {*PROMPT_IDS, *head})
        for next_id in map(int, np.flatnonzero(next_ones)):
            yield from texts((*head, next_id), probability * float(next_ones[next_id]))

    return dict(texts((), 1.0))


def sampled_text(decoder: NativeDecoder, seed: int) -> tuple[int, ...]:
    decoder.use(DENSE)
    decoder.truncate(len(PROMPT_IDS) - 1)
    first = decoder.forward(PROMPT_IDS[decoder.num_cached :])[-1]
    sampler = Sampler(replace(PARAMS, seed=seed), PROMPT_IDS)
    token_ids = [sampler.sample(first)]
    while len(token_ids) < NUM_TOKENS:
        rows = draft_round(
            decoder,
            FfnSwitch(decoder),
            token_ids[-1],
            length=min(LENGTH, NUM_TOKENS - len(token_ids) - 1) or 1,
            pack=FfnChoice(cluster=1),
            propose=sampler.propose,
            lengths=DraftLength(),
            greedy=False,
        )
        for row in rows:
            token_ids.append(sampler.sample(row.logits, row.draft))
            if len(token_ids) == NUM_TOKENS or row.draft is None or token_ids[-1] != row.draft.token_id:
                break
        decoder.truncate(len(PROMPT_IDS) + len(token_ids) - 1)
    return tuple(token_ids)


def p_value(decoder: NativeDecoder) -> float:
    expected = dense_probabilities(decoder)
    counts = Counter(sampled_text(decoder, seed) for seed in range(NUM_SAMPLES))
    if not counts.keys() <= expected.keys():
        return 0.0
    common = [text for text, probability in expected.items() if probability * NUM_SAMPLES >= 5]
    got = [counts[text] for text in common]
    wanted = [expected[text] * NUM_SAMPLES for text in common]
    rest_got, rest_wanted = NUM_SAMPLES - sum(got), NUM_SAMPLES - sum(wanted)
    assert len(common) > 20
    return float(chisquare([*got, rest_got], [*wanted, rest_wanted]).pvalue)


THRESHOLD = 1e-3


def test_sampled_texts_are_distributed_as_the_dense_models(decoder: NativeDecoder) -> None:
    assert p_value(decoder) > THRESHOLD


def always_accept(self: Sampler, probabilities: Any, draft: Any) -> int:
    return int(self._draw(probabilities) if draft is None else draft.token_id)


def no_residual(self: Sampler, probabilities: Any, draft: Any) -> int:
    if draft is not None:
        accepted = self._generator.random() * draft.probabilities[draft.token_id] < probabilities[draft.token_id]
        if accepted:
            return int(draft.token_id)
    return self._draw(probabilities)


@pytest.mark.parametrize("wrong", [always_accept, no_residual])
def test_the_chi_square_test_finds_wrong_rules(
    wrong: Any, decoder: NativeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "_draw_beside", wrong)
    assert p_value(decoder) < THRESHOLD / 100


def test_a_seed_gives_the_same_text_every_time(tiny_bundle: Bundles) -> None:
    loaded = load(tiny_bundle("llama", keep=0.9))
    options: dict[str, Any] = {"mode": "lossless", "temperature": 0.8, "top_k": 20, "seed": 3, "max_new_tokens": 100}
    first = loaded.generate(PROMPT, raw=True, **options)
    assert first.drafting is not None
    assert first.drafting.num_accepted > 0
    assert loaded.generate(PROMPT, raw=True, **options).token_ids == first.token_ids
    assert loaded.generate(PROMPT, raw=True, **{**options, "seed": 4}).token_ids != first.token_ids
