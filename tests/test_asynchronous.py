"""Streams for asyncio: a worker thread that stops when its consumer does."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from coreinfer import runtime

from .engine_inputs import PROMPT, load

OPTIONS = runtime.GenerationOptions(max_new_tokens=12)
TIMEOUT_SECONDS = 60


@pytest.fixture(scope="module")
def engine(tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return load(tiny_bundle("llama"))


def workers() -> list[str]:
    """The worker threads that do not end."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("coreinfer")]
    for thread in found:
        thread.join(TIMEOUT_SECONDS)
    return [thread.name for thread in found if thread.is_alive()]


def test_it_gives_what_stream_gives(engine: runtime.Engine) -> None:
    threads: set[str] = set()
    options = runtime.GenerationOptions(
        max_new_tokens=12, on_token=lambda _: threads.add(threading.current_thread().name)
    )

    async def consume() -> list[runtime.Token]:
        return [token async for token in engine.astream(PROMPT, options)]

    got = runtime.collect(asyncio.run(consume()))
    assert got.token_ids == engine.generate(PROMPT, max_new_tokens=12).token_ids
    assert len(threads) == 1
    assert threading.current_thread().name not in threads
    assert not workers()


def test_others_run_meanwhile(engine: runtime.Engine) -> None:
    gate = threading.Event()
    options = runtime.GenerationOptions(max_new_tokens=2, on_token=lambda _: gate.wait(TIMEOUT_SECONDS))

    async def consume() -> int:
        return len([token async for token in engine.astream(PROMPT, options)])

    async def both() -> int:
        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        # The generation waits for this.
        gate.set()
        return await task

    assert asyncio.run(both()) == 2


def test_a_consumer_that_stops_ends_the_generation(engine: runtime.Engine) -> None:
    seen: list[runtime.Token] = []
    options = runtime.GenerationOptions(max_new_tokens=100, on_token=seen.append)

    async def consume() -> None:
        async with aclosing(engine.astream(PROMPT, options)) as stream:
            async for token in stream:
                if token.num_tokens == 3:
                    break
        # The engine is free again at once.
        assert [token async for token in engine.astream(PROMPT, OPTIONS)]

    asyncio.run(consume())
    assert len(seen) == 3
    assert not workers()


def test_a_cancelled_task_ends_the_generation(engine: runtime.Engine) -> None:
    seen: list[runtime.Token] = []
    began, gate = threading.Event(), threading.Event()

    def hold(token: runtime.Token) -> None:
        seen.append(token)
        began.set()
        gate.wait(TIMEOUT_SECONDS)

    async def consume() -> None:
        async for _ in engine.astream(PROMPT, runtime.GenerationOptions(max_new_tokens=100, on_token=hold)):
            pass

    async def cancel() -> None:
        task = asyncio.create_task(consume())
        await asyncio.to_thread(began.wait, TIMEOUT_SECONDS)
        task.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert len(seen) == 1
    assert engine.generate(PROMPT, raw=True, max_new_tokens=2).text
    assert not workers()


def test_errors_reach_the_consumer(engine: runtime.Engine) -> None:
    with pytest.raises(runtime.ConfigError, match="prompt: expected"):
        engine.astream("")

    def fail(_: runtime.Token) -> None:
        raise ValueError("not this token")

    async def consume() -> None:
        async for _ in engine.astream(PROMPT, runtime.GenerationOptions(on_token=fail)):
            pass

    with pytest.raises(ValueError, match="not this token"):
        asyncio.run(consume())
    assert engine.generate(PROMPT, raw=True, max_new_tokens=2).text
