"""`coreinfer-run --batch`: answer every line of a JSON Lines file, and go on where an earlier call was interrupted."""

import hashlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import click
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.engine import Engine
from coreinfer.runtime.generation import Mode
from coreinfer.runtime.options import GenerationOptions
from tqdm import tqdm

from .batch_answering import Done, answer_lines
from .batch_lines import Line, count_lines, read_lines
from .batch_output import AnswerFile

__all__ = ["answer_file", "salt_of", "write_answers"]

# Where nobody watches the bar, it is a line in a log.
_BAR_SECONDS, _LOG_SECONDS = 0.1, 10.0

Skipped = Callable[[], object]
"""Called for each line that was answered before."""


def answer_file(engine: Engine, options: GenerationOptions, source: Path, target: Path) -> None:
    """Answer a batch file with one engine; go on where an earlier call with the same arguments was interrupted.

    Args:
        options: of lines that do not say otherwise.
        source: JSON Lines, in the forms that `batch_forms` and `openai_form` describe.
        target: gets a line for each line of `source`, in the order in which answers end.
    Raises:
        ConfigError: two lines have the same id, a file is not what it should be, or there are lines that could not be
            answered, after all others were.
    """

    def answer(answers: AnswerFile, num_left: int, skipped: Skipped) -> Iterator[Done]:
        return answer_lines(engine, options, _new_lines(source, answers, skipped), answers.digest)

    write_answers(salt_of(engine.bundle.path, engine.mode, options), source, target, answer)


def write_answers(
    salt: str, source: Path, target: Path, answer: Callable[[AnswerFile, int, Skipped], Iterable[Done]]
) -> None:
    """Write what lines of a batch become, with a bar, and say at the end how it went.

    Args:
        salt: says by whom and how lines are answered.
        answer: answers the lines that the file of answers does not have, about so many.
    Raises:
        ConfigError: as `answer_file`.
    """
    if target.exists() and target.samefile(source):
        raise ConfigError(f"-o {target}: it is the batch itself; give another file")
    num_lines = count_lines(source)
    with AnswerFile(target, salt) as answers:
        num_answers, num_tokens, begun = 0, 0, time.perf_counter()
        num_left = max(1, num_lines - answers.num_before)
        interval = _BAR_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
        bar = tqdm(total=num_lines, unit="line", mininterval=interval, dynamic_ncols=True, file=sys.stderr)
        with bar, closing(_iterator(answer(answers, num_left, bar.update))) as every:
            for done in every:
                answers.write(done.result, failed=done.failed)
                num_answers += not done.failed
                num_tokens += done.num_tokens
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


def salt_of(bundle_dir: Path, mode: Mode, options: GenerationOptions) -> str:
    """Say by whom and how lines are answered: with another bundle or other options, answers would be others.

    Args:
        mode: of the engine.
    """
    manifest = (bundle_dir / LAYOUT.manifest).read_bytes()
    return f"{hashlib.sha256(manifest).hexdigest()} {mode} {options!r}"


def _new_lines(source: Path, answers: AnswerFile, skipped: Skipped) -> Iterator[Line]:
    for line in read_lines(source):
        if answers.has(line):
            skipped()
        else:
            yield line


def _iterator(every: Iterable[Done]) -> Generator[Done, None, None]:
    """A generator, which can be closed, whatever the answers come from."""
    yield from every
