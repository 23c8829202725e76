"""`coreinfer-run --chat`: over a pipe, in this process, and at a terminal of its own."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from coreinfer import runtime
from coreinfer.runtime.commands.run import main
from coreinfer.runtime.options import GenerationOptions

from .model_factory import corpus_texts

FIRST, SECOND = corpus_texts()[0], corpus_texts()[2]
TIMEOUT_SECONDS = 60
BRIEF = GenerationOptions(max_new_tokens=5)
COMMAND = [sys.executable, "-c", "from coreinfer.runtime.commands.run import main; main()"]


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """A command installs a handler of SIGTERM, which outlives a call within this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def pipe(bundle: Path, *lines: str, arguments: tuple[str, ...] = ()) -> Result:
    options = ["--chat", "--json", "-n", "5", "--engine", "native", "--threads", "1", *arguments]
    return CliRunner().invoke(main, [str(bundle), *options], input="".join(f"{line}\n" for line in lines))


def token_ids(result: Result) -> list[tuple[int, ...]]:
    return [tuple(json.loads(line)["token_ids"]) for line in result.stdout.splitlines()]


# Over a pipe


def test_turns_are_those_of_a_conversation(bundle: Path, engine: runtime.Engine) -> None:
    result = pipe(bundle, FIRST, "", SECOND)
    conversation = engine.conversation()
    assert token_ids(result) == [conversation.send(text, BRIEF).token_ids for text in (FIRST, SECOND)]
    assert result.exit_code == 0
    assert ">" not in result.stderr.replace(" -> ", "")


def test_commands_say_nothing_on_stdout(bundle: Path) -> None:
    result = pipe(bundle, "/help", "/mode", "/clusters", "/stats", "/system", "/reset", "/quit")
    assert (result.exit_code, result.stdout) == (0, "")


def test_help_names_every_command(bundle: Path) -> None:
    lines = pipe(bundle, "/help").stderr.splitlines()
    for name in ("/help", "/mode [MODE]", "/clusters", "/stats", "/reset", "/system [TEXT]", "/quit", "//TEXT"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1


def test_mode_is_shown_and_changed(bundle: Path, engine: runtime.Engine) -> None:
    result = pipe(bundle, "/mode", "/mode dense", FIRST, arguments=("--mode", "similarity"))
    assert result.stderr.splitlines()[:2] == [
        f"mode {mode}, of auto, similarity, stability, fused, dense, lossless" for mode in ("similarity", "dense")
    ]
    assert json.loads(result.stdout)["mode"] == "dense"
    options = GenerationOptions(max_new_tokens=5, mode="dense")
    assert token_ids(result) == [engine.conversation().send(FIRST, options).token_ids]


def test_clusters_mark_where_the_answers_were(bundle: Path, engine: runtime.Engine) -> None:
    result = pipe(bundle, FIRST, "/clusters")
    lines = result.stderr.splitlines()[1:]
    last = json.loads(result.stdout)["cluster"]
    assert len(lines) == len(engine.manifest.clusters)
    for index, (line, cluster) in enumerate(zip(lines, engine.manifest.clusters, strict=True)):
        assert f" {index} {cluster.label}: {cluster.num_sentences} sentences" in line
        assert line.startswith("*") == (index == last)
        assert line.endswith(", 1 of 1 answers") == (index == last)


def test_stats_sum_the_answers_up(bundle: Path) -> None:
    result = pipe(bundle, "/stats", FIRST, SECOND, "/stats")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    lines = result.stderr.splitlines()
    assert lines[0] == "no answers yet"
    assert lines[-4].startswith("answers  2: ")
    read, cached = (sum(item[f"num_{kind}_tokens"] for item in answers) for kind in ("prompt", "cached"))
    assert cached > 0
    assert lines[-3].startswith(f"read     {read} tokens, {cached} of them cached, in ")
    assert lines[-2].startswith("written  10 tokens at ")
    assert lines[-1].startswith(f"room     {answers[-1]['num_prompt_tokens'] + 5} of 256 positions")


def test_reset_forgets(bundle: Path) -> None:
    result = pipe(bundle, FIRST, "/reset", FIRST)
    first, second = result.stdout.splitlines()
    assert json.loads(first)["token_ids"] == json.loads(second)["token_ids"]
    assert json.loads(first)["num_prompt_tokens"] == json.loads(second)["num_prompt_tokens"]


def test_a_system_message_begins_anew(bundle: Path, engine: runtime.Engine) -> None:
    result = pipe(bundle, FIRST, "/system Be brief.", SECOND)
    assert token_ids(result)[1] == engine.conversation("Be brief.").send(SECOND, BRIEF).token_ids
    assert "system message: Be brief." in result.stderr


def test_two_slashes_say_one(bundle: Path, engine: runtime.Engine) -> None:
    assert token_ids(pipe(bundle, "//etc")) == [engine.conversation().send("/etc", BRIEF).token_ids]


def test_nothing_is_read_after_quit(bundle: Path) -> None:
    assert len(pipe(bundle, FIRST, "/quit", SECOND).stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/fly", "error: /fly: no such command; /help lists them"),
        ("/mode fast", "error: /mode: expected auto, similarity, stability, fused, dense, lossless, got 'fast'"),
        ("flour " * 300, "error: prompt: expected 1 to 255 tokens, got "),
    ],
)
def test_an_error_is_one_line_and_the_chat_goes_on(line: str, named: str, bundle: Path, engine: runtime.Engine) -> None:
    result = pipe(bundle, line, FIRST)
    assert result.stderr.startswith(named)
    assert result.stderr.splitlines()[1].startswith("[cluster")
    assert token_ids(result) == [engine.conversation().send(FIRST, BRIEF).token_ids]
    # Nobody may have read the line.
    assert result.exit_code == 2


# At a terminal


class Terminal:
    """A program at a pseudo-terminal: what it wrote so far, and waiting for more, each wait bounded."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.written = ""

    def wait_for(self, text: str, seconds: float = TIMEOUT_SECONDS) -> None:
        """Read until a text comes; what was before it is dropped."""
        end = time.monotonic() + seconds
        while text not in self.written:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{text!r} did not come; got {self.written!r}")
            try:
                data = os.read(self.descriptor, 65536)
            except OSError:
                # Linux says so when the other side is closed.
                data = b""
            assert data, f"the program ended before {text!r}; got {self.written!r}"
            self.written += data.decode(errors="replace")
        self.written = self.written.partition(text)[2]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.descriptor, text.encode())

    def press_until(self, key: str, text: str) -> None:
        """Press a key, as a person would, once more when nothing comes of it for a while."""
        for _ in range(3):
            self.type(key)
            with suppress(TimeoutError):
                return self.wait_for(text, TIMEOUT_SECONDS / 3)
        raise TimeoutError(f"{text!r} did not come; got {self.written!r}")


@contextmanager
def at_terminal(bundle: Path, *arguments: str) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(bundle), "--chat", "--engine", "native", "--threads", "1", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        # A session of its own, whose keyboard is the terminal: only so does Ctrl-C reach it.
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    try:
        yield Terminal(controller), process
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def take_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_has_a_prompt_editing_and_an_end(bundle: Path) -> None:
    with at_terminal(bundle, "-n", "5") as (terminal, process):
        terminal.wait_for("> ")
        # Ctrl-A, Ctrl-K: to the beginning, and away with the rest.
        terminal.type("nonsense\x01\x0b/mode dense\r")
        terminal.wait_for("mode dense, of")
        terminal.wait_for("> ")
        # Ctrl-P: the line before.
        terminal.type("\x10\r")
        terminal.wait_for("mode dense, of")
        terminal.wait_for("> ")
        terminal.type("hello there\r")
        terminal.wait_for("[cluster")
        terminal.wait_for("> ")
        terminal.type("/fly\r")
        terminal.wait_for("error: /fly: no such command")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert process.wait(TIMEOUT_SECONDS) == 0


def test_an_interrupt_at_the_prompt_ends_the_chat(bundle: Path) -> None:
    with at_terminal(bundle) as (terminal, process):
        terminal.wait_for("> ")
        # Python's readline misses a Ctrl-C between its prompt and its wait for keys, like any that comes without a key.
        terminal.press_until("\x03", "error: interrupted")
        assert process.wait(TIMEOUT_SECONDS) == 130


SLOW = (
    "import sys, time, coreinfer.runtime.engines.native.decoder as n\n"
    "forward = n.NativeDecoder.forward\n"
    "wait = lambda: (print('forward', file=sys.stderr, flush=True), time.sleep(0.05))\n"
    "n.NativeDecoder.forward = lambda *a, **k: (wait(), forward(*a, **k))[1]\n"
)


def test_an_interrupt_during_an_answer_ends_the_answer_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tiny model is done before a key is pressed, so that each of its tokens is made to take 50 ms.
    monkeypatch.setitem(globals(), "COMMAND", [*COMMAND[:2], SLOW + COMMAND[2]])
    with at_terminal(bundle, "-n", "200", "--json") as (terminal, process):
        terminal.wait_for("> ")
        terminal.type("hello there\r")
        for _ in range(3):
            terminal.wait_for("forward")
        terminal.type("\x03")
        terminal.wait_for('"finish_reason": "cancelled"')
        terminal.wait_for("> ")
        terminal.type("/stats\r")
        terminal.wait_for("answers  1: ")
        terminal.wait_for("> ")
        terminal.type("/quit\r")
        assert process.wait(TIMEOUT_SECONDS) == 0
