"""`coreinfer-run --chat`: a conversation at the terminal or over a pipe.

Answers go to stdout, everything else (prompts, figures, what commands say) to stderr. What was said stays in memory:
no history file is written.
"""

import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import NoReturn, cast

import click
from coreinfer.bundles.errors import ConfigError, GenerationCancelled
from coreinfer.runtime.engine import Engine
from coreinfer.runtime.generation import MODES, Mode, Token, collect
from coreinfer.runtime.options import GenerationOptions, check_choice

from .printing import figures, from_stdin

__all__ = ["chat"]

_PROMPT = "> "
_COMMAND = "/"


@dataclass(kw_only=True)
class _Chat:
    """A running chat.

    Attributes:
        answers: the last token of each answer, which carries its figures.
        num_errors: turns and commands that failed.
    """

    engine: Engine
    options: GenerationOptions
    as_json: bool
    system: str | None
    answers: list[Token] = field(default_factory=list)
    num_errors: int = 0

    def __post_init__(self) -> None:
        self.conversation = self.engine.conversation(self.system)


class _Quit(Exception):
    """The user asked to end."""


def chat(engine: Engine, options: GenerationOptions, *, system: str | None, first: str | None, as_json: bool) -> int:
    """Answer one line after another until the end of input.

    Args:
        options: of every answer; `/mode` changes their mode.
        first: what is said first, before anything is read.
        as_json: print each answer as one JSON object, when it is finished.
    Returns:
        How many turns and commands failed; each said so in one line.
    Raises:
        ConfigError: the model has no chat template, or standard input is no text.
    """
    if engine.chat_template is None:
        raise ConfigError(f"--chat: {engine.manifest.model.name} has no chat template; leave --chat out")
    running = _Chat(engine=engine, options=options, as_json=as_json, system=system)
    for line in _lines(first):
        try:
            _take(running, line)
        except GenerationCancelled as error:
            click.echo(f"[{error}]", err=True)
        except ConfigError as error:
            running.num_errors += 1
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
        except _Quit:
            break
    return running.num_errors


def _take(running: _Chat, line: str) -> None:
    """Do what a line asks for; two slashes begin a text that begins with one."""
    if not line.startswith(_COMMAND):
        _answer(running, line)
    elif line.startswith(2 * _COMMAND):
        _answer(running, line.removeprefix(_COMMAND))
    else:
        name, _, argument = line.removeprefix(_COMMAND).partition(" ")
        if name not in _COMMANDS:
            raise ConfigError(f"/{name}: no such command; /help lists them, // begins a text with a slash")
        for said in _COMMANDS[name].run(running, argument.strip()):
            click.echo(said, err=True)


def _answer(running: _Chat, text: str) -> None:
    """Print one answer as it comes, or as JSON at its end; Ctrl-C ends it and leaves what was said."""
    tokens: list[Token] = []
    with _cancelled_by_interrupt() as cancel:
        for token in running.conversation.stream(text, replace(running.options, cancel=cancel)):
            tokens.append(token)
            if not running.as_json:
                click.echo(token.text, nl=False)
    running.answers.append(tokens[-1])
    click.echo(json.dumps(asdict(collect(tokens)), ensure_ascii=False) if running.as_json else "")
    click.echo(figures(tokens[-1]), err=True)


@contextmanager
def _cancelled_by_interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C end the answer rather than the program; a second one ends the program."""
    cancel = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def interrupt(_number: int, _frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    # Signals are the main thread's; where chat runs in another, Ctrl-C stays what it is.
    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


# Reading lines


def _lines(first: str | None) -> Iterator[str]:
    """Yield what the user says until the end of input, without blank lines."""
    if first:
        yield first
    read = _terminal_line if _is_terminal() else _piped_line
    while (line := read()) is not None:
        if line.strip():
            yield line.strip()


def _is_terminal() -> bool:
    """Whether lines can be edited: readline writes to stdout, which then must be a terminal as well."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _terminal_line() -> str | None:
    """Read a line with editing and the history of this chat, where Python has readline; None at Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401
    try:
        return from_stdin(lambda: input(_PROMPT))
    except EOFError:
        click.echo(err=True)
        return None


def _piped_line() -> str | None:
    """Read a line; the sign `>` is shown to people only, and never on stdout."""
    if sys.stdin.isatty():
        click.echo(_PROMPT, nl=False, err=True)
    return from_stdin(sys.stdin.readline) or None


# Commands: each gives the lines that it says


def _help(_running: _Chat, _argument: str) -> list[str]:
    return [f"/{f'{name} {command.argument}':15s}{command.help}" for name, command in _COMMANDS.items()] + [
        "//TEXT          say a text that begins with a slash",
        "Ctrl-C          end the answer; at the prompt, end the chat",
        "Ctrl-D          end the chat",
    ]


def _mode(running: _Chat, argument: str) -> list[str]:
    if argument:
        check_choice("/mode", argument, MODES)
        running.options = replace(running.options, mode=cast(Mode, argument))
    return [f"mode {running.options.mode or running.engine.mode}, of {', '.join(MODES)}"]


def _clusters(running: _Chat, _argument: str) -> list[str]:
    served = Counter(token.cluster for token in running.answers)
    last = running.answers[-1].cluster if running.answers else None
    return [
        f"{'*' if index == last else ' '} {index:3d} {cluster.label}: {cluster.num_sentences} sentences"
        + (f", {served[index]} of {len(running.answers)} answers" if served[index] else "")
        for index, cluster in enumerate(running.engine.manifest.clusters)
    ]


def _stats(running: _Chat, _argument: str) -> list[str]:
    answers = running.answers
    if not answers:
        return ["no answers yet"]
    last, modes = answers[-1], Counter(token.mode for token in answers)
    num_read, num_cached = sum(t.num_prompt_tokens for t in answers), sum(t.num_cached_tokens for t in answers)
    num_written, num_changes = sum(t.num_tokens for t in answers), sum(len(t.path) - 1 for t in answers)
    # An answer's first token comes from the prompt's own logits, and takes no time of its own.
    seconds = sum(t.decode_seconds for t in answers)
    speed = (num_written - len(answers)) / seconds if seconds else 0.0
    taken, room = last.num_prompt_tokens + last.num_tokens, running.engine.loaded.max_tokens
    return [
        f"answers  {len(answers)}: {', '.join(f'{count} {mode}' for mode, count in modes.items())}",
        f"read     {num_read} tokens, {num_cached} of them cached, in {sum(t.prefill_seconds for t in answers):.2f} s",
        f"written  {num_written} tokens at {speed:.1f} tok/s, {num_changes} changes of cluster on the way",
        f"room     {taken} of {room} positions taken at the end of the last answer",
    ]


def _reset(running: _Chat, _argument: str) -> list[str]:
    running.conversation.reset()
    return ["forgotten; the system message stays" if running.system is not None else "forgotten"]


def _system(running: _Chat, argument: str) -> list[str]:
    if argument:
        running.system = argument
        running.conversation = running.engine.conversation(argument)
    return [f"system message: {'none' if running.system is None else running.system or '(empty)'}"]


def _quit(_running: _Chat, _argument: str) -> NoReturn:
    raise _Quit


@dataclass(frozen=True, kw_only=True)
class _Command:
    """What `/NAME ARGUMENT` does, and what /help says of it."""

    run: Callable[[_Chat, str], list[str]]
    help: str
    argument: str = ""


_COMMANDS: Mapping[str, _Command] = {
    "help": _Command(run=_help, help="list the commands"),
    "mode": _Command(run=_mode, argument="[MODE]", help="set how FFN weights are chosen from now on, or show the mode"),
    "clusters": _Command(run=_clusters, help="list the clusters; a star marks the one that wrote the last answer"),
    "stats": _Command(run=_stats, help="show the tokens, speed and free context of this chat"),
    "reset": _Command(run=_reset, help="forget all turns"),
    "system": _Command(run=_system, argument="[TEXT]", help="start again with this system message, or show it"),
    "quit": _Command(run=_quit, help="end the chat"),
}
