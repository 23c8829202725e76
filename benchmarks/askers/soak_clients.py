"""Clients of a soak test: what they ask, how they leave, and whether what they got is what they would get alone."""

import asyncio
import contextlib
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from coreinfer import runtime
from coreinfer.bundles.errors import ConfigError, GenerationCancelled
from coreinfer.server.api_errors import RequestTimedOut
from coreinfer.server.jobs import Job
from coreinfer.server.worker import Worker

__all__ = ["DIRECT_WAYS", "SERVED_WAYS", "Question", "Tally", "be_direct", "be_served", "make_questions", "settle"]

_WORDS = ("flour", "oven", "bake", "loop", "variable", "compiler", "wave", "ship", "harbour", "court", "judge", "claim")
# Beginnings that many prompts share, so that sequences are forked and taken over.
_BEGINNINGS = ("", " ".join(_WORDS[:6] * 4) + " ", " ".join(_WORDS[6:] * 6) + " ")
_MODES: tuple[runtime.Mode, ...] = ("auto", "dense", "similarity", "stability", "fused", "lossless")
DIRECT_WAYS = ("generate", "list", "stream", "closed", "forgotten", "cancelled", "failing")
SERVED_WAYS = ("answered", "answered", "left", "timed out")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and the tokens of the lone answer."""

    prompt: str
    options: runtime.GenerationOptions
    expected: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Tally:
    """What came of all requests; any thread may add to it.

    Attributes:
        target: requests to make in all.
        ways: how often each way ended.
        wrong: what was not as it should be.
    """

    target: int
    num_begun: int = 0
    num_tokens: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """Whether another request is to be made."""
        with self.lock:
            if self.num_begun == self.target:
                return False
            self.num_begun += 1
            return True

    def end(self, way: str, question: Question, token_ids: Sequence[int], *, whole: bool) -> None:
        """Compare an answer, or with `whole` unset the start of one, with the lone one."""
        got = tuple(token_ids)
        right = got == (question.expected if whole else question.expected[: len(got)])
        with self.lock:
            self.ways[way] += 1
            self.num_tokens += len(got)
            if not right:
                self.wrong.append(f"{way}: {question}: got {got}")

    def fail(self, way: str, error: Exception) -> None:
        """Note an error that nobody asked for."""
        with self.lock:
            self.ways[way] += 1
            self.wrong.append(f"{way}: {type(error).__name__}: {error}")


def make_questions(engine: runtime.Engine, count: int, rng: random.Random, max_tokens: int) -> list[Question]:
    """Answer random questions alone; those that are too long for the model are left out."""
    questions: list[Question] = []
    while len(questions) < count:
        options = runtime.GenerationOptions(
            mode=rng.choice(_MODES), max_new_tokens=rng.randint(1, max_tokens), drift_tokens=8, raw=rng.random() < 0.5
        )
        if rng.random() < 0.5:
            options = replace(options, temperature=0.9, top_k=50, seed=rng.randint(0, 9))
        prompt = rng.choice(_BEGINNINGS) + " ".join(rng.choices(_WORDS, k=rng.randint(1, 30)))
        with contextlib.suppress(ConfigError):
            expected = tuple(token.token_id for token in engine.start(prompt, options))
            questions.append(Question(prompt=prompt, options=options, expected=expected))
    return questions


# Threads that use the engine itself


def be_direct(engine: runtime.Engine, questions: Sequence[Question], tally: Tally, rng: random.Random) -> None:
    """Ask, in this thread, until enough was asked."""
    while tally.begin():
        time.sleep(rng.expovariate(1000))
        way, question = rng.choice(DIRECT_WAYS), rng.choice(questions)
        try:
            _ask_directly(engine, way, question, tally, rng.randint(0, 8))
        except Exception as error:
            tally.fail(way, error)


def _ask_directly(engine: runtime.Engine, way: str, question: Question, tally: Tally, limit: int) -> None:
    if way == "generate":
        run = engine.answer_all([question.prompt], question.options)[0]
        tally.end(way, question, run.token_ids, whole=True)
    elif way == "list":
        answers = engine.answer_all([question.prompt] * 3, question.options)
        same = {answer.token_ids for answer in answers}
        tally.end(way, question, answers[0].token_ids if len(same) == 1 else (-1,), whole=True)
    elif way == "cancelled":
        _cancel(engine, question, tally, limit)
    elif way == "failing":
        _fail(engine, question, tally, limit)
    else:
        _stream(engine, way, question, tally, limit)


def _stream(engine: runtime.Engine, way: str, question: Question, tally: Tally, limit: int) -> None:
    stream, got, finished = engine.start(question.prompt, question.options), [], False
    for token in stream:
        got.append(token.token_id)
        finished = token.finish_reason is not None
        if way != "stream" and len(got) > limit:
            break
    if way == "closed":
        stream.close()
    elif way == "forgotten":
        # It is collected later, by whichever thread allocates then.
        cycle: list[object] = [stream]
        cycle.append(cycle)
    tally.end(way, question, got, whole=finished)


def _cancel(engine: runtime.Engine, question: Question, tally: Tally, limit: int) -> None:
    cancel, got = threading.Event(), list[int]()
    timer = threading.Timer(limit / 1000, cancel.set)
    timer.start()
    finished = False
    with contextlib.suppress(GenerationCancelled):
        for token in engine.start(question.prompt, replace(question.options, cancel=cancel)):
            got.append(token.token_id)
            finished = token.finish_reason in ("stop", "length")
    timer.join()
    tally.end("cancelled", question, got, whole=finished)


def _fail(engine: runtime.Engine, question: Question, tally: Tally, limit: int) -> None:
    got: list[int] = []

    def fail(token: runtime.Token) -> None:
        got.append(token.token_id)
        if len(got) > limit:
            raise LookupError("the client's own")

    whole = False
    with contextlib.suppress(LookupError):
        for token in engine.start(question.prompt, replace(question.options, on_token=fail)):
            whole = token.finish_reason is not None
    tally.end("failing", question, got, whole=whole)


# Clients of the server's worker


async def be_served(worker: Worker, questions: Sequence[Question], tally: Tally, rng: random.Random) -> None:
    """Ask, on this event loop, until enough was asked."""
    while tally.begin():
        await asyncio.sleep(rng.expovariate(1000))
        way, question = rng.choice(SERVED_WAYS), rng.choice(questions)
        seconds = rng.uniform(0.0, 0.02) if way == "timed out" else 300.0
        try:
            job = worker.submit(
                question.prompt, question.options, arrived_seconds=time.monotonic(), timeout_seconds=seconds
            )
            limit = rng.randint(0, 8) if way == "left" else None
            got, whole = await _take(job, limit)
            tally.end(way, question, got, whole=whole)
        except Exception as error:
            tally.fail(way, error)


async def _take(job: Job, limit: int | None) -> tuple[list[int], bool]:
    """Take an answer, or so many tokens of it; leave in any case."""
    got: list[int] = []
    finished = False
    try:
        if limit == 0:
            # It leaves before its prompt is read.
            return got, False
        async for token in job.tokens():
            got.append(token.token_id)
            finished = token.finish_reason is not None
            if limit is not None and len(got) >= limit:
                break
    except RequestTimedOut:
        return got, False
    finally:
        job.abandon()
    return got, finished


def settle(is_settled: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait until what was forgotten is collected and what was left has ended."""
    deadline = time.monotonic() + seconds
    while not is_settled() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return is_settled()
