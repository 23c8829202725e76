"""Several prompts at once give, prompt by prompt, what they give alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError
from coreinfer.runtime.generation import Mode

from .engine_inputs import DIALOGUE, PROMPT, SAMPLED
from .model_factory import corpus_texts

ENGINES: dict[str, dict[str, Any]] = {
    "native": {"engine": "native", "threads": 2},
    "torch": {"engine": "torch", "device": "cpu", "dtype": "float32"},
}
# Four topics, so several clusters, of several lengths; two prompts are the same.
PROMPTS = [corpus_texts()[number][: 30 + 9 * number] for number in (0, 1, 2, 3, 4, 8, 5, 0, 12)]
Bundles = Callable[..., Path]


def load(bundle: Path, engine: str = "native") -> runtime.Engine:
    return runtime.load(bundle, **ENGINES[engine])


def check_as_alone(engine: runtime.Engine, **options: Any) -> list[runtime.Generation]:
    alone = [engine.generate(prompt, raw=True, **options) for prompt in PROMPTS]
    together = engine.generate(PROMPTS, raw=True, **options)
    for got, expected in zip(together, alone, strict=True):
        assert (got.token_ids, got.text) == (expected.token_ids, expected.text)
        assert (got.path, got.mode, got.fallback) == (expected.path, expected.mode, expected.fallback)
        assert (got.finish_reason, got.logprobs) == (expected.finish_reason, expected.logprobs)
        assert got.num_prompt_tokens == expected.num_prompt_tokens
    return together


@pytest.mark.parametrize("sampling", [{}, {**SAMPLED, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("quantize", ["bf16", "int4"])
def test_native_batches_are_as_alone(quantize: str, sampling: Any, tiny_bundle: Bundles) -> None:
    engine = load(tiny_bundle("llama", quantize=quantize))
    got = check_as_alone(engine, mode="similarity", max_new_tokens=60, **sampling)
    assert len({generation.cluster for generation in got}) > 1
    assert len({generation.text for generation in got}) > 1


@pytest.mark.parametrize("sampling", [{}, {**SAMPLED, "seed": 5}], ids=["greedy", "sampled"])
def test_torch_batches_are_as_alone(sampling: Any, tiny_bundle: Bundles) -> None:
    check_as_alone(load(tiny_bundle("gemma3"), "torch"), mode="similarity", max_new_tokens=30, **sampling)


@pytest.mark.parametrize("mode", ["auto", "dense", "stability", "fused", "lossless"])
def test_every_mode_is_as_alone(mode: Mode, tiny_bundle: Bundles) -> None:
    check_as_alone(load(tiny_bundle("qwen3")), mode=mode, max_new_tokens=40)


@pytest.mark.parametrize(
    "options",
    [{"drift_tokens": 8}, {"logprobs": 2}, {"stop": ["a", "e"]}, {"temperature": 0.7, "seed": 1, "mode": "lossless"}],
)
def test_options_are_as_alone(options: Any, tiny_bundle: Bundles) -> None:
    check_as_alone(load(tiny_bundle("llama")), **{"mode": "similarity", "max_new_tokens": 60, **options})


def test_generations_that_end_leave_the_batch(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(tiny_bundle("llama"))
    sizes: list[int] = []
    forward_rows = engine.decoder.forward_rows

    def counted(sequences: Any, token_ids: Any, *, greedy: bool) -> Any:
        sizes.append(len(sequences))
        return forward_rows(sequences, token_ids, greedy=greedy)

    monkeypatch.setattr(engine.decoder, "forward_rows", counted)
    generations = engine.generate(PROMPTS, raw=True, mode="dense", max_new_tokens=30, stop=["a"])
    lengths = sorted(len(generation.token_ids) for generation in generations)
    assert lengths[0] < lengths[-1]
    # One pass for each further token of whoever is still there; the last one alone goes without rows.
    expected = [sum(length > number for length in lengths) for number in range(1, lengths[-1])]
    assert sizes == [size for size in expected if size > 1]


def test_prompts_of_a_cluster_share_passes(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(tiny_bundle("llama"))
    groups: list[int] = []
    forward_rows = engine.decoder.forward_rows

    def counted(sequences: Sequence[int], token_ids: Sequence[int], *, greedy: bool) -> Any:
        groups.append(len(sequences))
        return forward_rows(sequences, token_ids, greedy=greedy)

    monkeypatch.setattr(engine.decoder, "forward_rows", counted)
    generations = engine.generate(PROMPTS, raw=True, mode="similarity", max_new_tokens=10, drift_tokens=0)
    clusters = [generation.cluster for generation in generations]
    assert set(groups) <= {clusters.count(cluster) for cluster in clusters}
    assert max(groups) > 1


def test_lists_of_messages_are_prompts_and_a_list_of_messages_is_one(tiny_bundle: Bundles) -> None:
    engine = load(tiny_bundle("llama"))
    one = engine.generate(DIALOGUE, max_new_tokens=8)
    assert isinstance(one, runtime.Generation)
    both = engine.generate([DIALOGUE, DIALOGUE[1:2]], max_new_tokens=8)
    assert both[0].text == one.text
    assert both[1].text == engine.generate(DIALOGUE[1:2], max_new_tokens=8).text
    single = engine.generate([PROMPT], raw=True, max_new_tokens=8)
    assert [generation.text for generation in single] == [engine.generate(PROMPT, raw=True, max_new_tokens=8).text]


def check_nothing_is_held(engine: runtime.Engine) -> None:
    scheduler = engine.driver.scheduler
    assert (scheduler.num_active, scheduler.num_waiting, scheduler.pool.num_taken) == (0, 0, 0)
    assert not scheduler.has_work
    assert engine.decoder.sequence == 0


def test_a_batch_holds_no_sequence_afterwards(tiny_bundle: Bundles) -> None:
    engine = load(tiny_bundle("llama"))
    engine.generate(PROMPT, raw=True, max_new_tokens=8)
    for _ in range(3):
        engine.generate(PROMPTS, raw=True, max_new_tokens=8)
        check_nothing_is_held(engine)
        # Those of the first batch serve the others.
        assert engine.driver.scheduler.pool.num_sequences == len(PROMPTS)


def test_a_batch_that_fails_leaves_the_engine_as_it_was(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(tiny_bundle("llama"))
    with monkeypatch.context() as patched:
        patched.setattr(engine.decoder, "forward_rows", lambda *_, greedy: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(PROMPTS, raw=True, mode="dense", max_new_tokens=8)
    check_nothing_is_held(engine)
    assert engine.driver.scheduler.pool.num_sequences == 1
    assert engine.decoder.add_sequence() == 1
    engine.decoder.drop_sequence(1)
    check_as_alone(engine, mode="dense", max_new_tokens=8)


def test_wrong_batches_are_refused(tiny_bundle: Bundles) -> None:
    engine = load(tiny_bundle("llama"))
    wrong: list[tuple[Any, str]] = [
        ([PROMPT, ""], r"prompts\[1\]: prompt: expected text or messages, got an empty text"),
        ([PROMPT, "a b " * 400], r"prompts\[1\]: prompt: expected 1 to"),
        ([PROMPT, {"role": "user", "content": "x"}], r"prompts\[1\]: messages"),
        ([], "messages"),
    ]
    for prompts, reason in wrong:
        with pytest.raises(ConfigError, match=reason):
            engine.generate(prompts, raw=True)
    with pytest.raises(ConfigError, match="on_token"):
        engine.generate([PROMPT], raw=True, on_token=print)
    check_nothing_is_held(engine)
