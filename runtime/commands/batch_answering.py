"""Answer lines of a batch with one engine, many at once, each as it would be answered alone.

One thread steps the scheduler; the one that iterates reads lines, tokenizes them and takes answers as they end. However
many lines there are, only a limited number is in memory at once.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.runtime.engine import Engine
from coreinfer.runtime.generation import Token, collect
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.scheduling import MAX_PARALLEL, Post, Run

from .batch_forms import OWN, Answered, Asked, Form, Result
from .batch_lines import Line, is_openai
from .openai_form import OPENAI

__all__ = ["Done", "answer_lines"]

# Some wait, so that a place that becomes free is taken in the next step.
_MAX_OPEN = MAX_PARALLEL + 16


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a line became.

    Attributes:
        result: its line in the file of answers.
        num_tokens: of the answer; 0 where it failed.
    """

    result: Result
    failed: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A line that is being answered."""

    line: Line
    asked: Asked
    run: Run


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """How it went with a line: its tokens or what went wrong; without a line, what ended the thread that steps."""

    line: Line | None
    tokens: list[Token]
    error: Exception | None = None


def answer_lines(
    engine: Engine, options: GenerationOptions, lines: Iterable[Line], digest: Callable[[Line], str]
) -> Iterator[Done]:
    """Answer lines; yields what they became in the order in which answers end.

    Args:
        options: of lines that do not say otherwise.
        digest: returns what stands for a line in its answer.
    Raises:
        Exception: something went wrong that is not of a line's own making.
    """
    ended: SimpleQueue[_Ended] = SimpleQueue()
    is_open: dict[int, _Open] = {}
    with _stepping(engine, ended, is_open):
        for line in lines:
            try:
                is_open[line.number] = _begin(engine, options, line, ended)
            except CoreInferError as error:
                yield _refused(line, digest, error)
            while len(is_open) == _MAX_OPEN or not ended.empty():
                yield _finished(engine, digest, is_open, ended.get())
        while is_open:
            yield _finished(engine, digest, is_open, ended.get())


def _begin(engine: Engine, options: GenerationOptions, line: Line, ended: "SimpleQueue[_Ended]") -> _Open:
    """Hand a line to the scheduler.

    Raises:
        ConfigError: it cannot be answered.
    """
    if line.value is None:
        raise ConfigError(line.problem or "")
    asked = _form(line).read(line.value, options)
    # Nobody follows the tokens: prompts are read first, then all decode together.
    run = engine.submit(asked.prompt, asked.options, _collector(line, ended), watched=False)
    return _Open(line=line, asked=asked, run=run)


def _collector(line: Line, ended: "SimpleQueue[_Ended]") -> Post:
    tokens: list[Token] = []

    def post(event: Token | Exception) -> None:
        if isinstance(event, Exception):
            ended.put(_Ended(line=line, tokens=tokens, error=event))
            return
        tokens.append(event)
        if event.finish_reason is not None:
            ended.put(_Ended(line=line, tokens=tokens))

    return post


def _finished(engine: Engine, digest: Callable[[Line], str], is_open: dict[int, _Open], ended: _Ended) -> Done:
    """Say how it went with a line.

    Raises:
        Exception: something went wrong that is not of the line's own making.
    """
    line = ended.line
    if ended.error is not None and (line is None or not isinstance(ended.error, CoreInferError)):
        raise ended.error
    assert line is not None
    assert line.value is not None
    asked = is_open.pop(line.number).asked
    if ended.error is not None:
        return _refused(line, digest, ended.error)
    prompts = engine.loaded.prompts
    answered = Answered(
        line_id=line.id,
        digest=digest(line),
        value=line.value,
        asked=asked,
        generation=collect(ended.tokens, prompts.call_reader(asked.options.offered_tools)),
        model=engine.bundle.path.resolve().name,
        prompts=prompts,
    )
    return Done(result=_form(line).answer(answered), failed=False, num_tokens=len(ended.tokens))


def _refused(line: Line, digest: Callable[[Line], str], error: Exception) -> Done:
    return Done(result=_form(line).refusal(line.id, digest(line), error), failed=True, num_tokens=0)


def _form(line: Line) -> Form:
    return OPENAI if line.value is not None and is_openai(line.value) else OWN


@contextmanager
def _stepping(engine: Engine, ended: "SimpleQueue[_Ended]", is_open: dict[int, _Open]) -> Iterator[None]:
    """Step the scheduler in a thread of its own; at the end, also where one comes early, nothing is left in it."""
    closed = threading.Event()

    def serve() -> None:
        try:
            engine.driver.serve(closed.is_set)
        except Exception as error:
            ended.put(_Ended(line=None, tokens=[], error=error))

    thread = threading.Thread(target=serve, name="coreinfer-batch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        engine.driver.wake()
        thread.join()
        engine.driver.end([each.run for each in is_open.values()])
