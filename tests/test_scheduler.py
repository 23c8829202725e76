"""The loop of all generations, step by step: on a decoder without a model, and to the bit on the native engine."""

import random
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.runtime.decoding.drafting import DraftLength
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.scheduling import Run

from .fake_decoder import PASS_SECONDS, FakeDecoder
from .model_factory import corpus_texts

MODES: tuple[runtime.Mode, ...] = ("auto", "dense", "similarity", "stability", "fused", "lossless")
LONG = " ".join(corpus_texts())


@pytest.fixture
def make_engine(tiny_bundle: Callable[..., Path]) -> Callable[..., runtime.Engine]:
    """A function that puts an engine around a fake decoder; its options are the decoder's."""

    def make(**options: Any) -> runtime.Engine:
        bundle = open_bundle(tiny_bundle("llama"))
        decoder = FakeDecoder(bundle, **options)
        engine = runtime.Engine(bundle, decoder)
        engine.driver.scheduler.clock = lambda: decoder.seconds
        return engine

    return make


@pytest.fixture
def make_native(tiny_bundle: Callable[..., Path]) -> Callable[..., runtime.Engine]:
    """A function that loads the native engine with a KV cache of so many pages, reading in blocks of 16 tokens."""

    def make(num_pages: int = 1000) -> runtime.Engine:
        bundle = open_bundle(tiny_bundle("llama", quantize="int4"))
        page_bytes = NativeDecoder(bundle, threads=1).page_bytes
        decoder = NativeDecoder(bundle, threads=1, kv_cache_bytes=num_pages * page_bytes)
        assert decoder.num_pages == num_pages
        decoder.block_tokens = 16
        return runtime.Engine(bundle, decoder)

    return make


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 3 drafts and plain tokens by turns, whatever the clock says."""
    monkeypatch.setattr(
        DraftLength,
        "next",
        lambda self, limit: min(3, limit) if (self._num_rounds + self._num_plain) % 3 else 0,
    )


class Asked:
    """A request of a scheduler, and what came of it."""

    def __init__(self, engine: runtime.Engine, prompt: str, **options: Any) -> None:
        self.events: list[Any] = []
        options = {"raw": True} | options
        self.run: Run = engine.submit(prompt, runtime.GenerationOptions(**options), self.events.append)

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.events]

    @property
    def is_over(self) -> bool:
        return self.run.is_over


def prompt_of(engine: runtime.Engine, num_tokens: int, start: int = 1) -> str:
    ids = engine.tokenizer.encode(LONG).ids[start : start + num_tokens]
    return str(engine.tokenizer.decode(ids))


def finish(engine: runtime.Engine) -> None:
    while engine.driver.scheduler.has_work:
        engine.driver.scheduler.step()


def check_nothing_is_held(engine: runtime.Engine) -> None:
    """All pages come back once what finished runs left is forgotten too."""
    scheduler = engine.driver.scheduler
    assert (scheduler.num_active, scheduler.num_waiting, scheduler.pool.num_taken) == (0, 0, 0)
    while scheduler.pool.evict():
        pass
    assert engine.decoder.num_free_pages == engine.decoder.num_pages
    assert scheduler.pool.num_sequences == 1


def some_requests(count: int, rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    def request() -> tuple[str, dict[str, Any]]:
        options: dict[str, Any] = {"mode": rng.choice(MODES), "max_new_tokens": rng.randint(1, 50), "drift_tokens": 8}
        if rng.random() < 0.5:
            options |= {"temperature": 0.9, "seed": rng.randint(0, 9), "top_k": 50}
        start = rng.choice((0, 0, rng.randint(0, 3000)))
        return LONG[start : start + rng.randint(5, 400)], options

    return [request() for _ in range(count)]


# Nobody's text depends on others


@pytest.mark.parametrize(("kind", "num_pages"), [("fake", 10_000), ("fake", 40), ("native", 1000), ("native", 6)])
@pytest.mark.usefixtures("drafting")
def test_random_arrivals_and_departures_change_no_text(
    kind: str, num_pages: int, request: pytest.FixtureRequest
) -> None:
    make = request.getfixturevalue("make_native" if kind == "native" else "make_engine")
    rng = random.Random(num_pages)
    requests = some_requests(200, rng)
    alone, engine = make(), make(num_pages=num_pages)
    expected = [alone.generate(prompt, raw=True, **options).token_ids for prompt, options in requests]
    scheduler = engine.driver.scheduler
    scheduler.max_parallel, scheduler.pool.num_to_keep = 8, 20
    asked: list[Asked] = []
    leaving: dict[int, int] = {}
    while len(asked) < len(requests) or scheduler.has_work:
        if len(asked) < len(requests) and rng.random() < 0.5:
            prompt, options = requests[len(asked)]
            if rng.random() < 0.2:
                leaving[len(asked)] = rng.randint(0, 40)
            asked.append(Asked(engine, prompt, **options))
        scheduler.step()
        for number, limit in leaving.items():
            if len(asked[number].events) >= limit and not asked[number].is_over:
                engine.driver.end([asked[number].run])
    for number, (got, wanted) in enumerate(zip(asked, expected, strict=True)):
        assert got.run.failure is None
        whole = number not in leaving or got.run.finished
        assert got.token_ids == list(wanted if whole else wanted[: len(got.events)])
    assert sum(not got.run.finished for got in asked) > 10
    check_nothing_is_held(engine)


@pytest.mark.parametrize("watched", [True, False])
def test_prompts_that_wait_for_pages_stop_nobody(watched: bool, make_native: Callable[..., runtime.Engine]) -> None:
    alone, engine = make_native(), make_native(num_pages=6)
    prompts, options = (
        [f"{number} flour and butter " * 9 for number in range(8)],
        runtime.GenerationOptions(max_new_tokens=20),
    )
    expected = [alone.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    events: list[list[Any]] = [[] for _ in prompts]
    for prompt, own in zip(prompts, events, strict=True):
        engine.submit(prompt, options, own.append, watched=watched)
    num_steps = 0
    while engine.driver.scheduler.has_work:
        engine.driver.scheduler.step()
        num_steps += 1
        assert num_steps < 3000, "prompts wait for pages that nobody frees"
    assert [tuple(token.token_id for token in own) for own in events] == expected
    check_nothing_is_held(engine)


def test_memory_is_flat(make_native: Callable[..., runtime.Engine]) -> None:
    engine = make_native(num_pages=16)

    def answer(count: int) -> None:
        asked = [Asked(engine, prompt, **options) for prompt, options in some_requests(count, random.Random(1))]
        finish(engine)
        assert all(got.run.finished for got in asked)

    def resident_bytes() -> int:
        return int(Path("/proc/self/status").read_text(encoding="ascii").split("VmRSS:")[1].split()[0]) << 10

    answer(100)
    before = resident_bytes()
    for _ in range(3):
        answer(100)
    # A cache that stayed would take 64 times as much.
    assert resident_bytes() - before < 16 << 20
    check_nothing_is_held(engine)


def test_the_youngest_gives_way_and_is_read_again(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine(num_pages=12)
    prompts = [prompt_of(engine, 30, start) for start in (1, 200)]
    options: dict[str, Any] = {"mode": "dense", "max_new_tokens": 40}
    expected = [make_engine().generate(prompt, raw=True, **options).token_ids for prompt in prompts]
    old, young = (Asked(engine, prompt, **options) for prompt in prompts)
    gave_way = False
    while not old.is_over:
        engine.driver.scheduler.step()
        gave_way |= bool(young.events) and young.run.sequence is None
    finish(engine)
    assert gave_way
    assert [tuple(old.token_ids), tuple(young.token_ids)] == expected
    check_nothing_is_held(engine)


def test_what_fits_alone_never_fails(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine(num_pages=20)
    asked = [Asked(engine, prompt_of(engine, 100, start), max_new_tokens=50) for start in range(1, 600, 60)]
    finish(engine)
    assert all(got.run.finished for got in asked)
    assert sum(len(got.events) == 50 for got in asked) > 5
    check_nothing_is_held(engine)


# Reading


def test_a_prompt_that_nobody_waits_for_ends_at_its_next_block(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    decoder: Any = engine.decoder
    gone = Asked(engine, prompt_of(engine, 240), mode="dense", max_new_tokens=8)
    engine.driver.scheduler.step()
    engine.driver.end([gone.run])
    other = Asked(engine, prompt_of(engine, 20, 300), mode="dense", max_new_tokens=8)
    finish(engine)
    num_other = len(other.run.request.token_ids) - other.run.num_cached_tokens
    assert [call for call in decoder.calls if call[1] > 1] == [("read", 64), ("read", num_other)]
    assert (gone.events, len(other.events)) == ([], 8)
    check_nothing_is_held(engine)


def test_cancelling_ends_the_reading_of_a_prompt(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    cancel = threading.Event()
    asked = Asked(engine, prompt_of(engine, 240), mode="dense", cancel=cancel)
    engine.driver.scheduler.step()
    cancel.set()
    finish(engine)
    (error,) = asked.events
    assert isinstance(error, runtime.GenerationCancelled)
    assert str(error).startswith("cancelled after 64 of ")
    check_nothing_is_held(engine)


def test_a_short_prompt_does_not_wait_for_a_long_one(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    long = Asked(engine, prompt_of(engine, 240), mode="dense", max_new_tokens=4)
    engine.driver.scheduler.step()
    short = Asked(engine, prompt_of(engine, 20, 300), mode="dense", max_new_tokens=4)
    engine.driver.scheduler.step()
    assert (len(short.events), len(long.events)) == (2, 0)
    finish(engine)


def test_what_prompts_share_is_read_once(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    decoder: Any = engine.decoder
    start = prompt_of(engine, 120)
    asked = [Asked(engine, start + end, mode="dense", max_new_tokens=30) for end in (" tide", " soup", " law")]
    finish(engine)
    num_read = sum(count for kind, count in decoder.calls if kind == "read" and count > 1)
    assert num_read < len(asked[0].run.request.token_ids) + 40
    assert [got.run.num_cached_tokens > 100 for got in asked] == [False, True, True]
    check_nothing_is_held(engine)


# Fairness


def test_a_long_prompt_holds_up_nobodys_tokens(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    decoder: Any = engine.decoder
    times: list[float] = []
    engine.submit(
        prompt_of(engine, 20),
        runtime.GenerationOptions(mode="dense", max_new_tokens=100, raw=True),
        lambda _: times.append(decoder.seconds),
    )
    for _ in range(10):
        engine.driver.scheduler.step()
    long = Asked(engine, prompt_of(engine, 240), mode="dense", max_new_tokens=2)
    finish(engine)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[0] == pytest.approx(PASS_SECONDS)
    # Blocks share the passes that decode.
    assert max(gaps) < 2 * PASS_SECONDS
    while_reading = gaps[9:49]
    assert PASS_SECONDS < sum(while_reading) / len(while_reading) < 2 * PASS_SECONDS
    assert long.run.finished
    check_nothing_is_held(engine)


def test_every_cluster_decodes_in_every_step(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    asked = [Asked(engine, text, mode="similarity", max_new_tokens=30) for text in corpus_texts()[:8]]
    while any(not got.events for got in asked):
        engine.driver.scheduler.step()
    assert len({got.run.choice.cluster for got in asked}) > 1
    before = [len(got.events) for got in asked]
    engine.driver.scheduler.step()
    assert [len(got.events) for got in asked] == [count + 1 for count in before]
    finish(engine)


def test_neurons_of_their_own_take_turns(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    modes: tuple[runtime.Mode, ...] = ("stability", "similarity", "stability")
    asked = [
        Asked(engine, text, mode=mode, max_new_tokens=60) for text, mode in zip(corpus_texts()[:3], modes, strict=True)
    ]
    while any(not got.events for got in asked):
        engine.driver.scheduler.step()
    begun = [len(got.events) for got in asked]
    for _ in range(48):
        engine.driver.scheduler.step()
    gained = [len(got.events) - count for got, count in zip(asked, begun, strict=True)]
    assert sum(gained) == 48
    assert all(count >= 8 for count in gained)
    finish(engine)


# Streams


def test_a_stream_is_not_decoded_ahead_of_its_reader(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    paused = engine.stream(prompt_of(engine, 20), mode="dense", max_new_tokens=50)
    next(paused)
    engine.generate(prompt_of(engine, 30, 300), mode="dense", max_new_tokens=40)
    (run,) = engine.driver.scheduler.runs
    # While others decode, one token is made that nobody has asked for yet.
    assert (len(run.token_ids), len(run.tokens)) == (2, 1)
    assert len(list(paused)) == 49
    check_nothing_is_held(engine)


def test_streams_that_nobody_pulls_take_no_place(make_engine: Callable[..., runtime.Engine]) -> None:
    engine = make_engine()
    engine.driver.scheduler.max_parallel = 2
    paused = [engine.stream(prompt_of(engine, 20, start), max_new_tokens=9) for start in range(1, 200, 20)]
    for stream in paused:
        next(stream)
    assert engine.generate(prompt_of(engine, 20, 400), max_new_tokens=9).text
    assert [len(list(stream)) for stream in paused] == [8] * 10
    check_nothing_is_held(engine)


def test_a_failing_call_fails_for_its_own_runs_only(
    make_engine: Callable[..., runtime.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    expected = make_engine().generate(prompt_of(engine, 20), mode="dense", max_new_tokens=20, raw=True).token_ids
    well = Asked(engine, prompt_of(engine, 20), mode="dense", max_new_tokens=20)
    for _ in range(3):
        engine.driver.scheduler.step()
    ill = Asked(engine, prompt_of(engine, 30, 300), mode="stability", max_new_tokens=20)
    monkeypatch.setattr(engine.decoder, "prompt_statistics", lambda *_: 1 / 0)
    finish(engine)
    assert isinstance(ill.events[0], ZeroDivisionError)
    assert tuple(well.token_ids) == expected
    check_nothing_is_held(engine)
