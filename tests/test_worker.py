"""The server's worker on an engine: clients that leave at every stage, deadlines, and others on the same engine."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.server.api_errors import RequestTimedOut, ShuttingDown
from coreinfer.server.jobs import Job, merged
from coreinfer.server.metrics import Metrics, ModelMetrics
from coreinfer.server.worker import Worker

from .fake_decoder import FakeDecoder
from .model_factory import corpus_texts

PROMPTS = corpus_texts()[:8]
SECONDS = 20.0
OPTIONS = runtime.GenerationOptions(mode="dense", max_new_tokens=40, raw=True)


@pytest.fixture
def engine(tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    bundle = open_bundle(tiny_bundle("llama"))
    return runtime.Engine(bundle, FakeDecoder(bundle))


@pytest.fixture
def expected(engine: runtime.Engine) -> list[list[int]]:
    alone = runtime.Engine(engine.bundle, FakeDecoder(engine.bundle))
    return [[token.token_id for token in alone.start(prompt, OPTIONS)] for prompt in PROMPTS]


@contextmanager
def working(engine: runtime.Engine, *, parallel: int = 4) -> Iterator[Worker]:
    """A worker that nothing is left of."""
    metrics = ModelMetrics(metrics=Metrics(), model="tiny")
    worker = Worker("tiny", engine, parallel=parallel, capacity=16, metrics=metrics)
    try:
        yield worker
    finally:
        worker.close()
    scheduler = engine.driver.scheduler
    assert (scheduler.num_active, scheduler.num_waiting, scheduler.pool.num_taken) == (0, 0, 0)
    while scheduler.pool.evict():
        pass
    assert engine.decoder.num_free_pages == engine.decoder.num_pages


def run(main: Coroutine[Any, Any, None]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(SECONDS):
            await main

    asyncio.run(in_time())


def ask(worker: Worker, number: int, *, timeout_seconds: float = SECONDS, **options: Any) -> Job:
    asked = runtime.GenerationOptions(mode="dense", max_new_tokens=40, raw=True, **options)
    return worker.submit(PROMPTS[number], asked, arrived_seconds=time.monotonic(), timeout_seconds=timeout_seconds)


async def whole(job: Job) -> list[int]:
    return [token.token_id async for token in job.tokens()]


class Gate:
    """Stops whoever calls a method of an object until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        method = getattr(target, name)

        def stop(*arguments: Any, **options: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(SECONDS)
            return method(*arguments, **options)

        monkeypatch.setattr(target, name, stop)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, SECONDS)


# Tokenizing and routing; handed over, not yet admitted; reading or decoding.
STAGES = ["router.route", "driver.submit", "decoder.forward"]


def gate_at(monkeypatch: pytest.MonkeyPatch, engine: runtime.Engine, stage: str) -> Gate:
    part, name = stage.split(".")
    return Gate(monkeypatch, getattr(engine, part), name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_leaves(
    engine: runtime.Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    async def leave() -> None:
        gate = gate_at(monkeypatch, engine, stage)
        job = ask(worker, 0)
        await gate.wait()
        job.abandon()
        others = [ask(worker, number) for number in (1, 2)]
        gate.opened.set()
        assert [await whole(other) for other in others] == expected[1:3]
        assert job.is_over

    with working(engine) as worker:
        run(leave())


@pytest.mark.parametrize("stage", STAGES)
def test_the_time_of_a_request_ends(
    engine: runtime.Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    async def be_late() -> None:
        gate = gate_at(monkeypatch, engine, stage)
        job = ask(worker, 0, timeout_seconds=0.05)
        await gate.wait()
        with pytest.raises(RequestTimedOut):
            await whole(job)
        job.abandon()
        other = ask(worker, 1)
        gate.opened.set()
        assert await whole(other) == expected[1]

    with working(engine) as worker:
        run(be_late())


def test_the_time_of_a_request_that_waits_ends(engine: runtime.Engine, expected: list[list[int]]) -> None:
    async def wait() -> None:
        first = ask(worker, 0)
        late = ask(worker, 1, timeout_seconds=0.0)
        with pytest.raises(RequestTimedOut):
            await whole(late)
        late.abandon()
        assert await whole(first) == expected[0]

    with working(engine, parallel=1) as worker:
        run(wait())


def test_one_of_three_choices_is_given_up(engine: runtime.Engine, expected: list[list[int]]) -> None:
    async def choose() -> None:
        jobs = [ask(worker, number) for number in range(3)]
        got: list[list[int]] = [[] for _ in jobs]
        async for index, token in merged([jobs[0], jobs[2]]):
            got[index].append(token.token_id)
            jobs[1].abandon()
        assert got[:2] == [expected[0], expected[2]]

    with working(engine) as worker:
        run(choose())


def test_one_of_three_choices_fails(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def choose() -> None:
        jobs = [ask(worker, number) for number in range(2)]
        jobs.append(worker.submit(PROMPTS[2], stability, arrived_seconds=time.monotonic(), timeout_seconds=SECONDS))
        with pytest.raises(ZeroDivisionError):
            async for _ in merged(jobs):
                pass
        for job in jobs:
            job.abandon()

    stability = runtime.GenerationOptions(mode="stability", max_new_tokens=40, raw=True)
    monkeypatch.setattr(engine.decoder, "prompt_statistics", lambda *_: 1 / 0)
    with working(engine) as worker:
        run(choose())


def test_what_is_ended_after_the_last_sweep_is_freed(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, closing = engine.driver.scheduler, threading.Event()
    runs = [engine.submit(prompt, OPTIONS, lambda _event: None) for prompt in PROMPTS[:2]]

    step = scheduler.step

    def step_and_end() -> None:
        step()
        engine.driver.end(runs)
        closing.set()

    monkeypatch.setattr(scheduler, "step", step_and_end)
    engine.driver.serve(closing.is_set)
    assert (scheduler.num_active, scheduler.num_waiting, scheduler.pool.num_taken) == (0, 0, 0)


def test_conversations_in_other_threads(engine: runtime.Engine, expected: list[list[int]]) -> None:
    alone = runtime.Engine(engine.bundle, FakeDecoder(engine.bundle))
    texts: list[list[str]] = [[], []]

    def talk(on: runtime.Engine, answers: list[str]) -> None:
        talking = on.conversation()
        for text in ("soup", "and lemon", "and salt"):
            answers.append(talking.send(text, runtime.GenerationOptions(mode="dense", max_new_tokens=15)).text)

    async def serve() -> None:
        thread = asyncio.create_task(asyncio.to_thread(talk, engine, texts[0]))
        for _ in range(5):
            jobs = [ask(worker, number) for number in range(8)]
            assert [await whole(job) for job in jobs] == expected
        await thread

    with working(engine) as worker:
        run(serve())
    talk(alone, texts[1])
    assert texts[0] == texts[1]


def test_closing_tells_all_stages(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def close() -> None:
        gate = gate_at(monkeypatch, engine, "decoder.forward")
        jobs = [ask(worker, number) for number in range(4)]
        await gate.wait()
        worker.cut()
        gate.opened.set()
        for job in jobs:
            with pytest.raises(ShuttingDown):
                await whole(job)
        with pytest.raises(ShuttingDown):
            ask(worker, 0)

    with working(engine, parallel=2) as worker:
        run(close())
