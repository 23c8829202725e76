"""What goes wrong beside a generation: readers that pause, leave or fail, and a KV cache that is too small for all."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle

from .fake_decoder import PAGE_TOKENS, FakeDecoder
from .model_factory import corpus_texts

LONG = " ".join(corpus_texts())
SECONDS = 5.0

Make = Callable[..., runtime.Engine]


@pytest.fixture
def make_engine(tiny_bundle: Callable[..., Path]) -> Make:
    """A function that puts an engine around a fake decoder; its options are the decoder's."""

    def make(**options: Any) -> runtime.Engine:
        bundle = open_bundle(tiny_bundle("llama"))
        return runtime.Engine(bundle, FakeDecoder(bundle, **options))

    return make


def prompt_of(engine: runtime.Engine, num_tokens: int, start: int = 1) -> str:
    return str(engine.tokenizer.decode(engine.tokenizer.encode(LONG).ids[start : start + num_tokens]))


def answer(engine: runtime.Engine, prompt: str, **options: Any) -> tuple[int, ...]:
    generation: runtime.Generation = engine.generate(prompt, **{"mode": "dense", "max_new_tokens": 20, **options})
    return generation.token_ids


def check_nothing_is_held(engine: runtime.Engine) -> None:
    """All pages come back once what finished runs left is forgotten too."""
    scheduler = engine.driver.scheduler
    assert (scheduler.num_active, scheduler.num_waiting, scheduler.pool.num_taken) == (0, 0, 0)
    while scheduler.pool.evict():
        pass
    assert engine.decoder.num_free_pages == engine.decoder.num_pages


@contextmanager
def in_time() -> Iterator[Callable[..., Any]]:
    """A function that does something in a thread, and fails where that never ends."""

    def do(work: Callable[[], Any]) -> Any:
        results: list[Any] = []

        def keep() -> None:
            try:
                results.append(work())
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert results, "it hangs"
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    yield do


# A KV cache that is too small for all


def test_a_list_of_prompts_that_do_not_fit_together_is_answered(make_engine: Make) -> None:
    engine, roomy = make_engine(num_pages=12), make_engine()
    prompts = [prompt_of(engine, 40, start) for start in range(1, 400, 50)]
    options: dict[str, Any] = {"mode": "dense", "max_new_tokens": 20}
    expected = [roomy.generate(prompt, **options).token_ids for prompt in prompts]
    with in_time() as do:
        got = do(lambda: engine.generate(prompts, **options))
    assert [generation.token_ids for generation in got] == expected
    check_nothing_is_held(engine)


def test_a_paused_stream_gives_way_to_who_wants_tokens(make_engine: Make) -> None:
    engine, roomy = make_engine(num_pages=12), make_engine()
    paused_prompt, prompt = (prompt_of(engine, 50, start) for start in (1, 300))
    expected = [answer(roomy, text) for text in (paused_prompt, prompt)]
    paused = engine.stream(paused_prompt, mode="dense", max_new_tokens=20)
    got = [next(paused).token_id for _ in range(5)]
    with in_time() as do:
        assert do(lambda: answer(engine, prompt)) == expected[1]
        got += do(lambda: [token.token_id for token in paused])
    assert tuple(got) == expected[0]
    check_nothing_is_held(engine)


def test_paused_streams_take_turns_in_a_cache_for_one(make_engine: Make) -> None:
    engine, roomy = make_engine(num_pages=12), make_engine()
    prompts = [prompt_of(engine, 50, start) for start in (1, 200, 400)]
    expected = [answer(roomy, prompt) for prompt in prompts]
    streams = [engine.stream(prompt, mode="dense", max_new_tokens=20) for prompt in prompts]
    with in_time() as do:
        rows = do(lambda: [[token.token_id for token in row] for row in zip(*streams, strict=True)])
    assert [tuple(column) for column in zip(*rows, strict=True)] == expected
    check_nothing_is_held(engine)


def test_what_never_fits_is_refused_before_anything_is_computed(make_engine: Make) -> None:
    engine = make_engine(num_pages=5)
    decoder: Any = engine.decoder
    with pytest.raises(ConfigError, match=r"prompt: expected 1 to 40 tokens.*kv_cache_mb"):
        engine.generate(prompt_of(engine, 60), mode="dense")
    with pytest.raises(ConfigError, match=r"more than the 41 that the KV cache has room for"):
        engine.generate(prompt_of(engine, 10), mode="dense", max_new_tokens=100, whole_length=True)
    assert decoder.calls == []


@pytest.mark.parametrize("mode", ["dense", "lossless", "similarity"])
def test_an_answer_ends_where_the_kv_cache_does(make_engine: Make, mode: runtime.Mode) -> None:
    engine, roomy = make_engine(num_pages=5), make_engine()
    prompt = prompt_of(engine, 12)
    whole = roomy.generate(prompt, mode=mode, max_new_tokens=100)
    got = engine.generate(prompt, mode=mode, max_new_tokens=100)
    num_tokens = 5 * PAGE_TOKENS + 1 - got.num_prompt_tokens
    assert got.finish_reason == "length"
    assert got.token_ids == whole.token_ids[:num_tokens]
    assert len(got.token_ids) == num_tokens
    check_nothing_is_held(engine)


def test_shared_beginnings_leave_no_more_sequences_than_are_to_be_kept(make_engine: Make) -> None:
    engine = make_engine()
    engine.driver.scheduler.pool.num_to_keep = 4
    start = prompt_of(engine, 60)
    for number in range(30):
        answer(engine, start + prompt_of(engine, 20, 100 + 10 * number), max_new_tokens=5)
    assert engine.driver.scheduler.pool.num_sequences <= 4
    check_nothing_is_held(engine)


# Who leaves, pauses or fails


def test_who_leaves_before_it_is_admitted_leaves_nothing(make_engine: Make) -> None:
    engine = make_engine()
    run = engine.submit(prompt_of(engine, 20), runtime.GenerationOptions(), lambda _: None)
    engine.driver.end([run])
    assert engine.driver.scheduler.num_waiting == 0
    assert not engine.driver.scheduler.has_work


def test_a_cancelled_generation_does_not_wait_for_a_place(make_engine: Make) -> None:
    engine = make_engine()
    scheduler = engine.driver.scheduler
    scheduler.max_parallel = 1
    first: list[Any] = []
    second: list[Any] = []
    cancel = threading.Event()
    engine.submit(prompt_of(engine, 20), runtime.GenerationOptions(mode="dense", max_new_tokens=50), first.append)
    options = runtime.GenerationOptions(mode="dense", max_new_tokens=50, cancel=cancel)
    engine.submit(prompt_of(engine, 20, 100), options, second.append)
    for _ in range(3):
        scheduler.step()
    cancel.set()
    scheduler.step()
    assert [str(event).split(" of ")[0] for event in second] == ["cancelled after 0"]
    assert not first[-1].finish_reason


def test_cancelling_what_gave_way_loses_no_token(make_engine: Make) -> None:
    engine = make_engine(num_pages=24)
    cancel = threading.Event()
    old: list[Any] = []
    young: list[Any] = []
    engine.submit(prompt_of(engine, 90), runtime.GenerationOptions(mode="dense", max_new_tokens=60), old.append)
    options = runtime.GenerationOptions(mode="dense", max_new_tokens=60, cancel=cancel)
    run = engine.submit(prompt_of(engine, 70, 300), options, young.append)
    scheduler = engine.driver.scheduler
    while not (young and run.sequence is None):
        scheduler.step()
    cancel.set()
    while scheduler.has_work:
        scheduler.step()
    assert young[-1].finish_reason == "cancelled"
    assert old[-1].finish_reason == "length"
    check_nothing_is_held(engine)


def test_whoever_fails_to_take_tokens_fails_alone(make_engine: Make) -> None:
    engine = make_engine()
    prompts = [prompt_of(engine, 20, start) for start in (1, 100)]
    expected = answer(make_engine(), prompts[1])
    well: list[Any] = []
    options = runtime.GenerationOptions(mode="dense", max_new_tokens=20)
    ill = engine.submit(prompts[0], options, lambda event: 1 / 0)
    engine.submit(prompts[1], options, well.append)
    while engine.driver.scheduler.has_work:
        engine.driver.scheduler.step()
    assert isinstance(ill.failure, ZeroDivisionError)
    assert tuple(token.token_id for token in well) == expected
    check_nothing_is_held(engine)


def test_a_failing_on_token_ends_its_generation_only(make_engine: Make) -> None:
    engine = make_engine()
    prompts = [prompt_of(engine, 20, start) for start in (1, 100)]
    other = engine.stream(prompts[1], mode="dense", max_new_tokens=20)
    begun = [next(other).token_id]

    def fail(token: runtime.Token) -> None:
        if token.num_tokens == 4:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        answer(engine, prompts[0], on_token=fail)
    assert engine.driver.scheduler.num_active == 1
    assert (*begun, *(token.token_id for token in other)) == answer(make_engine(), prompts[1])
    check_nothing_is_held(engine)


def test_a_stream_that_is_collected_in_another_thread(make_engine: Make) -> None:
    """While that thread steps, and while it waits for one that steps."""
    engine = make_engine()
    expected = answer(make_engine(), prompt_of(engine, 20, 200))
    decoder: Any = engine.decoder
    forward = decoder.forward
    forgotten: list[Any] = []

    def forget(*arguments: Any, **options: Any) -> Any:
        # In the middle of a step of the thread that leads.
        if forgotten:
            forgotten.clear()
            gc.collect()
        return forward(*arguments, **options)

    def forget_one() -> None:
        stream = engine.stream(prompt_of(engine, 30), mode="dense", max_new_tokens=30)
        next(stream)
        forgotten.append([stream, forgotten])

    with in_time() as do:
        for _ in range(5):
            do(forget_one)
            decoder.forward = forget
            threads = [threading.Thread(target=do, args=(lambda: answer(engine, prompt_of(engine, 20, 200)),))]
            threads[0].start()
            assert do(lambda: answer(engine, prompt_of(engine, 20, 200))) == expected
            threads[0].join()
            decoder.forward = forward
    check_nothing_is_held(engine)


def test_an_interrupted_list_leaves_nothing(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    add, count = engine.driver.scheduler.add, iter(range(10))

    def interrupted(run: Any) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        add(run)

    monkeypatch.setattr(engine.driver.scheduler, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt_of(engine, 20, start) for start in (1, 50, 100)])
    assert not engine.driver.scheduler.has_work
    check_nothing_is_held(engine)


def test_generations_go_on_where_their_engine_is_forgotten(make_engine: Make) -> None:
    expected = answer(make_engine(), prompt_of(make_engine(), 20))
    engine = make_engine()
    stream = engine.stream(prompt_of(engine, 20), mode="dense", max_new_tokens=20)
    del engine
    gc.collect()
    assert tuple(token.token_id for token in stream) == expected
