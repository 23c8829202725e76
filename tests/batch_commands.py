"""Running `coreinfer-run --batch` within a test, and what it wrote."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from coreinfer.runtime.commands.run import main

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def invoke(*arguments: object) -> Result:
    with _restored_process():
        return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(bundle: Path, batch: Path, out: Path, *more: object) -> Result:
    return invoke(bundle, "--batch", batch, "-o", out, "--engine", "native", "--threads", 1, "-n", 9, *more)


@contextmanager
def _restored_process() -> Iterator[None]:
    """A command installs handlers of signals and of the log, which outlive a call within this process."""
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        logging.root.handlers[:] = handlers


def answers(out: Path) -> dict[Any, Any]:
    """The answers by their ids."""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = {line.get("custom_id", line["id"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return result


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def openai(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "any", **body}}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
