"""Processes that are forked from one that has decoded: they have its memory, and none of its threads."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime

from .engine_inputs import PROMPT
from .forks import CHILD_SECONDS, in_fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> runtime.Engine:
    return runtime.load(bundle, engine="native", threads=2)


def answer(engine: runtime.Engine) -> str:
    return engine.generate(PROMPT, max_new_tokens=12, seed=1, temperature=0.9).text


def test_a_forked_process_generates_the_same_text(engine: runtime.Engine) -> None:
    expected = answer(engine)
    assert in_fork(lambda: answer(engine)) == expected
    # A fork of the fork, and the parent.
    assert in_fork(lambda: in_fork(lambda: answer(engine))) == expected
    assert answer(engine) == expected


def test_an_engine_may_end_in_a_forked_process(bundle: Path) -> None:
    engines = [runtime.load(bundle, engine="native", threads=2)]
    expected = answer(engines[0])

    def end_it_and_load_another() -> str:
        engines.clear()
        return answer(runtime.load(bundle, engine="native", threads=2))

    assert in_fork(end_it_and_load_another) == expected


def test_a_forked_process_goes_on_with_a_generation_that_waits(engine: runtime.Engine) -> None:
    expected = answer(engine)
    stream = engine.stream(PROMPT, max_new_tokens=12, seed=1, temperature=0.9)
    begun = "".join(next(stream).text for _ in range(5))
    assert begun + in_fork(lambda: "".join(token.text for token in stream)) == expected
    assert begun + "".join(token.text for token in stream) == expected


def test_a_fork_while_another_thread_decodes_is_told(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    expected, forward = answer(engine), engine.decoder.forward

    def wait(*arguments: Any, **options: Any) -> Any:
        inside.set()
        go_on.wait(CHILD_SECONDS)
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.decoder, "forward", wait)
    thread = threading.Thread(target=lambda: engine.generate(PROMPT, max_new_tokens=2))
    thread.start()
    assert inside.wait(CHILD_SECONDS)
    try:
        said = in_fork(lambda: answer(engine))
    finally:
        go_on.set()
        thread.join()
    assert said.startswith("ConfigError: engine: another thread was generating when this process was forked")
    assert "load the bundle again" in said
    assert answer(engine) == expected


def test_a_fork_while_another_thread_has_a_token_in_hand(engine: runtime.Engine) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(token: object) -> None:
        inside.set()
        go_on.wait(CHILD_SECONDS)

    expected = answer(engine)
    thread = threading.Thread(target=lambda: engine.generate(PROMPT, max_new_tokens=2, on_token=wait))
    thread.start()
    assert inside.wait(CHILD_SECONDS)
    try:
        assert in_fork(lambda: answer(engine)) == expected
    finally:
        go_on.set()
        thread.join()


def _answer_of(engine: runtime.Engine, answers: "multiprocessing.SimpleQueue[str]") -> None:
    signal.alarm(CHILD_SECONDS)
    answers.put(answer(engine))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_multiprocessing_by_fork(engine: runtime.Engine) -> None:
    expected = answer(engine)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_answer_of, args=(engine, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(CHILD_SECONDS + 5)
        assert process.exitcode == 0
    assert [answers.get() for _ in processes] == [expected, expected]


def test_the_torch_engine_refuses_a_forked_process(bundle: Path) -> None:
    """Torch's threads are not there in it, and torch waits for them for ever."""
    import torch

    before = torch.get_num_threads()
    engine = runtime.load(bundle, engine="torch", device="cpu", threads=2)
    try:
        expected = answer(engine)
        said = in_fork(lambda: answer(engine))
        assert said.startswith("CoreInferError: the torch engine cannot work in a forked process")
        assert "spawn" in said
        # One thread needs no other.
        torch.set_num_threads(1)
        assert in_fork(lambda: answer(engine)) == answer(engine) == expected
    finally:
        torch.set_num_threads(before)
