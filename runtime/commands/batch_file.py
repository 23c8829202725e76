"""`coreinfer-run --batch`: answer every line of a JSON Lines file, many at once, each as it would be answered alone.

One thread steps the scheduler; this one reads lines, tokenizes them and writes answers as they end. However long the
file is, only a limited number of lines is in memory at once.
"""

import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Never

import click
from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.engine import Engine
from coreinfer.runtime.generation import Token, collect
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.scheduling import MAX_PARALLEL, Post, Run
from tqdm import tqdm

from .batch_forms import OWN, Answered, Asked, Form
from .batch_lines import Line, count_lines, is_openai, read_lines
from .batch_output import AnswerFile
from .openai_form import OPENAI

__all__ = ["answer_file"]

# Some wait, so that a place that becomes free is taken in the next step.
_MAX_OPEN = MAX_PARALLEL + 16
# Where nobody watches the bar, it is a line in a log.
_BAR_SECONDS, _LOG_SECONDS = 0.1, 10.0


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


def answer_file(engine: Engine, options: GenerationOptions, source: Path, target: Path) -> None:
    """Answer a batch file; go on where an earlier call with the same arguments was interrupted.

    Args:
        options: of lines that do not say otherwise.
        source: JSON Lines, in the forms that `batch_forms` and `openai_form` describe.
        target: gets a line for each line of `source`, in the order in which answers end.
    Raises:
        ConfigError: two lines have the same id, a file is not what it should be, or there are lines that could not be
            answered, after all others were.
    """
    if target.exists() and target.samefile(source):
        raise ConfigError(f"-o {target}: it is the batch itself; give another file")
    num_lines = count_lines(source)
    with AnswerFile(target, _salt(engine, options)) as answers:
        num_answers, num_tokens, begun = 0, 0, time.perf_counter()
        with _bar(num_lines) as bar:
            for length in _answer_lines(engine, options, source, answers):
                num_answers += length is not None
                num_tokens += length or 0
                bar.update()
        seconds = time.perf_counter() - begun
        before = f" ({answers.num_before} before)" if answers.num_before else ""
        click.echo(
            f"[{num_lines - answers.num_failed} of {num_lines} lines answered{before}; now {num_answers} answers, "
            f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tok/s]",
            err=True,
        )
    if answers.num_failed:
        raise ConfigError(
            f"{answers.num_failed} of {num_lines} lines of {source} were not answered; {target} says why at each"
        )


def _salt(engine: Engine, options: GenerationOptions) -> str:
    """Say by whom and how lines are answered: with another bundle or other options, answers would be others."""
    manifest = (engine.bundle.path / LAYOUT.manifest).read_bytes()
    return f"{hashlib.sha256(manifest).hexdigest()} {engine.mode} {options!r}"


def _answer_lines(
    engine: Engine, options: GenerationOptions, source: Path, answers: AnswerFile
) -> Iterator[int | None]:
    """Answer lines and write the answers; yields the number of tokens of each line, None where there are none now."""
    ended: SimpleQueue[_Ended] = SimpleQueue()
    is_open: dict[int, _Open] = {}
    with _stepping(engine, ended, is_open):
        for line in read_lines(source):
            if answers.has(line):
                yield None
                continue
            try:
                is_open[line.number] = _begin(engine, options, line, ended)
            except CoreInferError as error:
                _refuse(answers, line, error)
                yield None
            while len(is_open) == _MAX_OPEN or not ended.empty():
                yield _write(engine, answers, is_open, ended.get())
        while is_open:
            yield _write(engine, answers, is_open, ended.get())


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


def _write(engine: Engine, answers: AnswerFile, is_open: dict[int, _Open], ended: _Ended) -> int | None:
    """Write how it went with a line.

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
        _refuse(answers, line, ended.error)
        return None
    prompts = engine.loaded.prompts
    answered = Answered(
        line_id=line.id,
        digest=answers.digest(line),
        value=line.value,
        asked=asked,
        generation=collect(ended.tokens, prompts.call_reader(asked.options.offered_tools)),
        model=engine.bundle.path.resolve().name,
        prompts=prompts,
    )
    answers.write(_form(line).answer(answered), failed=False)
    return len(ended.tokens)


def _refuse(answers: AnswerFile, line: Line, error: Exception) -> None:
    answers.write(_form(line).refusal(line.id, answers.digest(line), error), failed=True)


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


def _bar(num_lines: int) -> "tqdm[Never]":
    interval = _BAR_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(total=num_lines, unit="line", mininterval=interval, dynamic_ncols=True, file=sys.stderr)
