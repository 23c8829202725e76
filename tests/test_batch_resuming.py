"""`coreinfer-run --batch`: interrupted, gone on with, and left as a whole."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.runtime.commands import batch_file
from coreinfer.runtime.commands.batch_output import AnswerFile
from coreinfer.runtime.options import GenerationOptions

from .batch_commands import answers, done, openai, refusal, run
from .model_factory import corpus_texts

TEXTS = corpus_texts()
COMMAND = [sys.executable, "-c", "from coreinfer.runtime.commands.run import main; main()"]
TIMEOUT_SECONDS = 120
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}, "strict": True}}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_an_interrupted_batch_goes_on(
    bundle: Path, write_lines: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"prompt": 3, "id": "wrong"}
    batch = write_lines(*({"prompt": f"{number} soup", "raw": True} for number in range(6)), wrong, openai("o", n=2))
    refusal(run(bundle, batch, out))
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    asked: list[Any] = []
    submit = runtime.Engine.submit

    def noted(self: runtime.Engine, prompt: Any, *arguments: Any, **keywords: Any) -> Any:
        asked.append(prompt)
        return submit(self, prompt, *arguments, **keywords)

    monkeypatch.setattr(runtime.Engine, "submit", noted)
    for num_kept, cut in ((8, b""), (5, b""), (5, lines[5][:-1]), (5, lines[5][:20]), (7, b"{"), (0, lines[0][:30])):
        asked.clear()
        kept = b"".join(lines[:num_kept])
        out.write_bytes(kept + cut)
        result = run(bundle, batch, out)
        # Lines that failed count, whenever they did.
        assert "2 of 8 lines" in refusal(result)
        assert out.read_bytes().startswith(kept)
        again = answers(out)
        assert {name: line.get("text") for name, line in again.items()} == {
            json.loads(line).get("custom_id", json.loads(line)["id"]): json.loads(line).get("text") for line in lines
        }
        num_asked = sum(b'"text"' in line for line in lines[num_kept:])
        assert len(asked) == num_asked
        assert (f"({num_kept} before)" in result.stderr) == (num_kept > 0)


def test_other_requests_under_an_id_are_refused(bundle: Path, write_lines: Any, out: Path) -> None:
    done(run(bundle, write_lines({"prompt": "soup"}), out))
    before = out.read_bytes()
    for prompt, more in (("flour", []), ("soup", ["--temperature", "1"])):
        batch = write_lines({"prompt": prompt})
        assert "it has an answer for id 1, to which line 1 of the batch, the options or the bundle" in refusal(
            run(bundle, batch, out, *more)
        )
        assert out.read_bytes() == before
    # More lines are welcome.
    done(run(bundle, write_lines({"prompt": "soup"}, {"prompt": "flour"}), out))
    assert out.read_bytes().startswith(before)
    assert answers(out).keys() == {1, 2}


@pytest.mark.parametrize("text", ["mine\n", "mine", '{"id": 1}\n', '{"id": 1, "prompt": "x"}', '[{"id": 1}]\n', "3\n"])
def test_a_file_of_something_else_is_left_alone(text: str, bundle: Path, write_lines: Any, out: Path) -> None:
    out.write_text(text, encoding="utf-8")
    assert "line 1: expected an answer of --batch, got" in refusal(run(bundle, write_lines({"prompt": "soup"}), out))
    assert out.read_text(encoding="utf-8") == text


def test_outputs_that_cannot_be(bundle: Path, write_lines: Any, out: Path, tmp_path: Path) -> None:
    batch = write_lines({"prompt": "soup"})
    assert "it is the batch itself" in refusal(run(bundle, batch, batch))
    assert "cannot be written" in refusal(run(bundle, batch, tmp_path))
    assert "cannot be written" in refusal(run(bundle, batch, tmp_path / "no" / "where"))
    with out.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing it" in refusal(run(bundle, batch, out))
    assert json.loads(batch.read_text()) == {"prompt": "soup"}


def test_an_interrupt_leaves_whole_lines(bundle: Path, write_lines: Any, out: Path) -> None:
    batch = write_lines(*({"prompt": f"{number} {TEXTS[0]}"[:200], "raw": True} for number in range(3000)))
    arguments = [*COMMAND, bundle, "--batch", batch, "-o", out, "--engine", "native", "--threads", 1, "-n", 40]
    process = subprocess.Popen(
        [str(item) for item in arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Shells start background jobs, and what those start, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until = time.monotonic() + TIMEOUT_SECONDS
        while not (out.exists() and out.stat().st_size > 1000):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    last = said.decode().splitlines()[-1]
    assert last == f"error: interrupted; {out} keeps what is answered, and the same command goes on from there"
    assert "Traceback" not in said.decode()
    assert out.read_bytes().endswith(b"\n")
    assert 0 < len(answers(out)) < 3000


def test_nothing_is_left_in_the_engine(
    bundle: Path, write_lines: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = runtime.load(bundle, engine="native", threads=1)
    writes = 0

    def interrupt(*_: object, **__: object) -> None:
        nonlocal writes
        writes += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "write", interrupt)
    batch = write_lines(
        *({"prompt": f"{number} soup", "raw": True, "max_new_tokens": number + 1} for number in range(9))
    )
    with pytest.raises(KeyboardInterrupt):
        batch_file.answer_file(loaded, GenerationOptions(), batch, out)
    assert writes == 1
    assert (loaded.driver.scheduler.num_active, loaded.driver.scheduler.has_work) == (0, False)
    assert loaded.generate("soup", max_new_tokens=2).token_ids
