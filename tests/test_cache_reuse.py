"""What stays in the KV cache from one generation to the next, and that nothing else of it stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

from .engine_inputs import DIALOGUE, SAMPLED
from .model_factory import corpus_texts

BLOCK = 16
LONG = " ".join(corpus_texts()[0::4])
SYSTEM = [DIALOGUE[0], {"role": "user", "content": corpus_texts()[3]}]


@pytest.fixture(params=["native", "torch"])
def load_engine(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> Callable[..., runtime.Engine]:
    """A function that loads the tiny bundle in one of the engines, which reads prompts in blocks of 16."""

    def load(**options: Any) -> runtime.Engine:
        engine = runtime.load(tiny_bundle("llama", **options), engine=request.param, threads=1)
        engine.decoder.block_tokens = BLOCK  # type: ignore[misc]
        return engine

    return load


def prompt_of(engine: runtime.Engine, num_tokens: int, start: int = 1) -> str:
    text = engine.tokenizer.decode(engine.tokenizer.encode(LONG).ids[start : start + num_tokens])
    return str(text)


def most(engine: runtime.Engine, num_prompt_tokens: int) -> int:
    """Tokens of a prompt that has been read before that need not be read again."""
    if engine.decoder.calls_alike:
        # Two are left, so that the last is not read alone where it was not.
        return num_prompt_tokens - 2 + (num_prompt_tokens % BLOCK == 1)
    return (num_prompt_tokens - 1) // BLOCK * BLOCK


def same(a: runtime.Generation, b: runtime.Generation) -> bool:
    return (a.text, a.token_ids, a.logprobs) == (b.text, b.token_ids, b.logprobs)


@pytest.mark.parametrize("mode", ["similarity", "stability", "dense"])
def test_the_same_prompt_gives_the_same_text_whatever_ran_before(
    mode: runtime.Mode, load_engine: Callable[..., runtime.Engine]
) -> None:
    engine = load_engine()
    prompt = prompt_of(engine, 90)
    options: dict[str, Any] = {"mode": mode, "seed": 5, "max_new_tokens": 12, "logprobs": 0, **SAMPLED}
    expected = load_engine().generate(prompt, raw=True, **options)
    engine.generate(prompt, raw=True, mode="similarity", max_new_tokens=30)
    befores: list[Callable[[], object]] = [
        lambda: engine.generate(prompt, raw=True, mode="similarity", max_new_tokens=30),
        lambda: engine.generate(prompt_of(engine, 50), raw=True, mode="fused", max_new_tokens=30),
        lambda: engine.generate(prompt_of(engine, 60), raw=True, mode="dense", max_new_tokens=90),
        lambda: engine.generate(corpus_texts()[1], raw=True, max_new_tokens=3),
        lambda: engine.conversation().send(prompt, runtime.GenerationOptions(max_new_tokens=9)),
        lambda: engine.generate(prompt_of(engine, 140), raw=True, mode="similarity", max_new_tokens=3),
    ]
    for before in befores:
        before()
        got = engine.generate(prompt, raw=True, **options)
        assert same(got, expected)
    assert len(set(expected.token_ids)) > 1


def test_what_was_read_is_taken_over(load_engine: Callable[..., runtime.Engine]) -> None:
    engine = load_engine()
    short, long = prompt_of(engine, 60), prompt_of(engine, 120)
    first = engine.generate(long, raw=True, mode="dense", max_new_tokens=4)
    again = engine.generate(long, raw=True, mode="dense", max_new_tokens=4)
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == most(engine, again.num_prompt_tokens) > 60
    assert engine.decoder.num_cached == again.num_prompt_tokens + len(again.token_ids) - 1
    begun = engine.generate(short, raw=True, mode="similarity", max_new_tokens=4)
    assert begun.num_cached_tokens == most(engine, begun.num_prompt_tokens)
    assert engine.generate(corpus_texts()[1], raw=True, max_new_tokens=1).num_cached_tokens < BLOCK


def test_what_a_pack_decoded_is_read_again(load_engine: Callable[..., runtime.Engine]) -> None:
    engine = load_engine()
    prompt = prompt_of(engine, 40)
    answer = engine.generate(prompt, raw=True, mode="dense", max_new_tokens=60)
    longer = engine.generate(prompt + answer.text, raw=True, mode="dense", max_new_tokens=1)
    whole_blocks = answer.num_prompt_tokens // BLOCK * BLOCK
    assert longer.num_cached_tokens == (answer.num_prompt_tokens if engine.decoder.calls_alike else whole_blocks)


def test_without_a_dense_ffn_only_the_same_pack_counts(load_engine: Callable[..., runtime.Engine]) -> None:
    engine = load_engine(dense=False)
    prompt = prompt_of(engine, 60)
    engine.generate(prompt, raw=True, max_new_tokens=2)
    again = engine.generate(prompt, raw=True, max_new_tokens=2)
    assert again.num_cached_tokens == most(engine, again.num_prompt_tokens)
    engine.decoder.truncate(0)
    engine.decoder.use(FfnChoice(cluster=(again.cluster + 1) % 4))
    for start in range(0, 48, BLOCK):
        engine.decoder.forward(engine.tokenizer.encode(prompt).ids[start : start + BLOCK])
    assert engine.generate(prompt, raw=True, max_new_tokens=2).num_cached_tokens == 0


def test_who_uses_the_decoder_does_no_harm(load_engine: Callable[..., runtime.Engine]) -> None:
    engine = load_engine()
    prompt = prompt_of(engine, 60)
    expected = engine.generate(prompt, raw=True, mode="dense", max_new_tokens=12)
    engine.decoder.truncate(20)
    engine.decoder.use(DENSE)
    engine.decoder.forward([5, 6, 7] * 20)
    assert same(engine.generate(prompt, raw=True, mode="dense", max_new_tokens=12), expected)


def test_a_call_that_failed_empties_the_cache(
    load_engine: Callable[..., runtime.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine()
    prompt = prompt_of(engine, 60)
    expected = engine.generate(prompt, raw=True, max_new_tokens=8)
    calls = 0
    forward = engine.decoder.forward

    def fail_later(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise MemoryError("no more")
        return forward(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", fail_later)
        with pytest.raises(MemoryError):
            engine.generate(prompt, raw=True, max_new_tokens=8)
    assert engine.decoder.num_cached == 0
    assert same(engine.generate(prompt, raw=True, max_new_tokens=8), expected)


def test_messages_share_their_beginning(load_engine: Callable[..., runtime.Engine]) -> None:
    engine = load_engine()
    other = [SYSTEM[0], {"role": "user", "content": corpus_texts()[2]}]
    expected = load_engine().generate(other, max_new_tokens=10)
    engine.generate(SYSTEM, max_new_tokens=10)
    got = engine.generate(other, max_new_tokens=10)
    assert got.num_cached_tokens >= BLOCK
    assert same(got, expected)
