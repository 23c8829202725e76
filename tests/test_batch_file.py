"""`coreinfer-run --batch`: a file of requests, answered many at once."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from coreinfer import runtime
from coreinfer.runtime.commands import batch_file
from coreinfer.runtime.commands.batch_output import AnswerFile
from coreinfer.runtime.commands.run import main
from coreinfer.runtime.options import GenerationOptions

from .model_factory import corpus_texts

TEXTS = corpus_texts()
COMMAND = [sys.executable, "-c", "from coreinfer.runtime.commands.run import main; main()"]
TIMEOUT_SECONDS = 120
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}, "strict": True}}


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """A command installs handlers of signals and of the log, which outlive a call within this process."""
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.root.handlers[:] = handlers


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def file(*lines: object, name: str = "batch.jsonl") -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        return tmp_path / name

    return file


def run(bundle: Path, batch: Path, out: Path, *more: object) -> Result:
    options = ["--engine", "native", "--threads", 1, "-n", 9, *more]
    return CliRunner().invoke(main, [str(item) for item in [bundle, "--batch", batch, "-o", out, *options]])


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


# Answers


def test_every_line_gets_the_answer_that_it_would_get_alone(
    bundle: Path, engine: runtime.Engine, write: Any, out: Path
) -> None:
    own: list[dict[str, Any]] = [
        {"prompt": TEXTS[0]},
        {"messages": user(TEXTS[1]), "id": "second", "max_new_tokens": 5},
        {"prompt": TEXTS[2], "raw": True, "temperature": 0.8, "seed": 3, "top_k": 50},
        {"prompt": TEXTS[3], "mode": "dense", "logit_bias": {"7": 4.0}, "stop": ["e"]},
        {"prompt": TEXTS[0], "id": 77, "logprobs": 2, "mode": "fused"},
    ]
    batch = write(own[0], "", *own[1:])
    result = done(run(bundle, batch, out))
    got = answers(out)
    assert got.keys() == {1, "second", 4, 5, 77}
    for asked, line_id in zip(own, (1, "second", 4, 5, 77), strict=True):
        options = {name: value for name, value in asked.items() if name not in ("id", "prompt", "messages")}
        if "logit_bias" in options:
            options["logit_bias"] = {7: 4.0}
        alone = engine.generate(asked.get("prompt") or asked["messages"], **{"max_new_tokens": 9, **options})
        assert got[line_id]["token_ids"] == list(alone.token_ids)
        assert (got[line_id]["text"], got[line_id]["finish_reason"]) == (alone.text, alone.finish_reason)
        assert (got[line_id]["cluster"], got[line_id]["mode"]) == (alone.cluster, alone.mode)
        assert (got[line_id]["num_tokens"], got[line_id]["tool_calls"]) == (len(alone.token_ids), [])
        assert len(got[line_id]["logprobs"]) == (len(alone.token_ids) if "logprobs" in asked else 0)
    num_tokens = sum(line["num_tokens"] for line in got.values())
    assert f"[5 of 5 lines answered; now 5 answers, {num_tokens} tokens in " in result.stderr


def test_openai_lines(bundle: Path, engine: runtime.Engine, write: Any, out: Path) -> None:
    settled: dict[str, Any] = {"temperature": 0, "n": 1, "stream": False, "stop": None, "user": "me"}
    parts = [{"type": "text", "text": "Speak"}, {"type": "text", "text": "of law."}]
    messages = [{"role": "developer", "content": parts}, *user(TEXTS[0])]
    batch = write(
        openai("chat", messages=messages, max_completion_tokens=7, **settled),
        openai("sampled", messages=user(TEXTS[1]), seed=4, top_k=20, logit_bias={"9": 1}),
        openai("text", COMPLETIONS, prompt=TEXTS[2], max_tokens=6, **settled),
        openai("short", COMPLETIONS, prompt=TEXTS[2], temperature=0),
    )
    done(run(bundle, batch, out))
    got = answers(out)
    system = {"role": "system", "content": "Speak\nof law."}
    alone = {
        "chat": engine.generate([system, *user(TEXTS[0])], max_new_tokens=7),
        "sampled": engine.generate(
            user(TEXTS[1]), temperature=1.0, seed=4, top_k=20, logit_bias={9: 1}, max_new_tokens=9
        ),
        "text": engine.generate(TEXTS[2], raw=True, max_new_tokens=6),
        "short": engine.generate(TEXTS[2], raw=True, max_new_tokens=16),
    }
    assert got.keys() == alone.keys()
    for name, expected in alone.items():
        assert (got[name]["error"], got[name]["response"]["status_code"]) == (None, 200)
        body = got[name]["response"]["body"]
        is_chat = name in ("chat", "sampled")
        assert body["object"] == ("chat.completion" if is_chat else "text_completion")
        choice = body["choices"][0]
        assert (choice["message"]["content"] if is_chat else choice["text"]) == expected.text
        assert choice["finish_reason"] == expected.finish_reason
        assert body["usage"]["completion_tokens"] == len(expected.token_ids)
        assert body["usage"]["prompt_tokens"] == expected.num_prompt_tokens
        assert body["coreinfer"]["cluster"] == expected.cluster
    assert got["chat"]["response"]["request_id"] != got["text"]["response"]["request_id"]


def test_openai_calls(long_bundle: Path, write: Any, out: Path) -> None:
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "look_up"}}
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    batch = write(
        openai("call", messages=user("soup"), tools=[TOOL], tool_choice=named, max_tokens=200, temperature=0),
        openai("form", messages=user("soup"), response_format=form, max_tokens=200, temperature=0),
    )
    done(run(long_bundle, batch, out))
    got = {name: line["response"]["body"]["choices"][0] for name, line in answers(out).items()}
    assert json.loads(got["form"]["message"]["content"]) == {"a": 1}
    if got["call"]["finish_reason"] != "length":
        call = got["call"]["message"]["tool_calls"][0]
        assert (got["call"]["finish_reason"], call["function"]["name"]) == ("tool_calls", "look_up")


def test_openai_clients_read_the_answers(bundle: Path, write: Any, out: Path) -> None:
    chat = pytest.importorskip("openai.types.chat").ChatCompletion
    text = pytest.importorskip("openai.types").Completion
    done(run(bundle, write(openai("a", messages=user("soup")), openai("b", COMPLETIONS, prompt="soup")), out))
    got = answers(out)
    assert chat.model_validate(got["a"]["response"]["body"]).choices[0].message.role == "assistant"
    assert text.model_validate(got["b"]["response"]["body"]).choices[0].text


def test_more_lines_than_are_open_at_once(
    bundle: Path, engine: runtime.Engine, write: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_file, "_MAX_OPEN", 3)
    most = 0
    submit = runtime.Engine.submit

    def counted(self: runtime.Engine, *arguments: Any, **keywords: Any) -> Any:
        nonlocal most
        scheduler = self.driver.scheduler
        most = max(most, scheduler.num_active + scheduler.num_waiting)
        return submit(self, *arguments, **keywords)

    monkeypatch.setattr(runtime.Engine, "submit", counted)
    done(run(bundle, write(*({"prompt": f"{number} soup", "raw": True} for number in range(12))), out))
    got = answers(out)
    assert got.keys() == set(range(1, 13))
    for number in range(12):
        assert got[number + 1]["text"] == engine.generate(f"{number} soup", raw=True, max_new_tokens=9).text
    # Those that ended in the step under way are still counted.
    assert most <= 2 * 3


def test_answers_come_as_they_end(bundle: Path, write: Any, out: Path) -> None:
    batch = write({"prompt": TEXTS[0], "max_new_tokens": 60, "raw": True}, {"prompt": TEXTS[0], "max_new_tokens": 1})
    done(run(bundle, batch, out))
    assert list(answers(out)) == [2, 1]


# What cannot be answered


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2: no JSON"),
        ("\x00", "line 2: no JSON"),
        ('{"prompt": NaN}', "line 2: no JSON (NaN is no JSON)"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"prompt": "\\ud800"}', "line 2: expected whole characters, got half of one"),
        ('{"id": true, "prompt": "x"}', "line 2: id: expected a string or a whole number, got True"),
        ({"custom_id": 3, "body": {}}, "line 2: custom_id: expected a string, got 3"),
        ({}, "prompt, messages: expected one of them, got neither"),
        ({"prompt": "a", "messages": []}, "prompt, messages: expected one of them, got both"),
        ({"prompt": 3}, "prompt: expected a str, got int"),
        ({"messages": "a"}, "messages: expected a list, got str"),
        ({"messages": [3]}, "messages[0]: expected an object"),
        ({"prompt": ""}, "prompt: expected text or messages, got an empty text"),
        ({"prompt": "flour " * 300}, "prompt: expected 1 to 255 tokens"),
        ({"prompt": "a", "max_tokens": 3}, "max_tokens: not known here; expected "),
        ({"prompt": "a", "on_token": 3}, "on_token: not known here"),
        ({"prompt": "a", "temperature": "hot"}, "temperature: expected"),
        ({"prompt": "a", "stop": "x"}, "stop: expected a list"),
        ({"prompt": "a", "logit_bias": {"x": 3}}, "logit_bias: expected ids of tokens, got 'x'"),
        ({"prompt": "a", "logit_bias": {"999999999": 3}}, "logit_bias: expected ids from 0"),
        ({"prompt": "a", "mode": "fast"}, "mode: expected"),
        ({"prompt": "a", "tools": 5, "tool_choice": "required"}, "tools: expected a list of JSON schemas, got 5"),
        ({"prompt": "a", "tools": [{"function": 5}], "tool_choice": "required"}, "tools[0].function.name: expected"),
    ],
)
def test_a_line_that_cannot_be_answered_stops_no_other(
    line: object, named: str, bundle: Path, write: Any, out: Path
) -> None:
    result = run(bundle, write({"prompt": TEXTS[0]}, line, {"prompt": TEXTS[1]}), out)
    assert refusal(result).endswith(f"batch.jsonl were not answered; {out} says why at each")
    got = answers(out)
    assert got.keys() == {1, 2, 3}
    assert got[2].keys() == {"id", "request", "error"}
    assert named in got[2]["error"]
    assert "\n" not in got[2]["error"]
    assert got[1]["text"]
    assert got[3]["text"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"url": "/v1/embeddings"}, "url: expected /v1/chat/completions, /v1/completions, got '/v1/embeddings'"),
        ({"method": "GET"}, "method: expected POST, got 'GET'"),
        ({"body": 3}, "body: expected a JSON object, got int"),
        ({"id": 3}, "id: not known beside custom_id, method, url, body"),
        ({"body": {"messages": user("a"), "audio": 1, "top_logprobs": 2}}, "audio, top_logprobs: not known in a batch"),
        ({"body": {"messages": user("a"), "n": 2}}, "n: expected 1 in a batch, got 2"),
        ({"body": {"messages": user("a"), "n": True}}, "n: expected 1 in a batch, got True"),
        ({"body": {"messages": user("a"), "stream": True}}, "stream: expected False in a batch, got True"),
        ({"body": {"prompt": "a"}}, "prompt: not known in a batch"),
        ({"body": {}}, "messages: expected a list, got NoneType"),
        ({"body": {"messages": [3]}}, "messages[0]: expected an object"),
        ({"body": {"messages": [{"role": "user", "content": [{"type": "image"}]}]}}, "messages[0].content[0]: exp"),
        ({"body": {"messages": [{"role": "user", "content": "a", "audio": 1}]}}, "messages[0]: audio: not known"),
        ({"body": {"messages": user("a"), "max_tokens": 0}}, "max_tokens: expected a whole number of at least 1"),
        ({"body": {"messages": user("a"), "max_tokens": 2, "max_completion_tokens": 3}}, "give one of the two"),
        ({"body": {"messages": user("a"), "max_tokens": 300}}, "300 for the answer are more than the 256"),
        ({"body": {"messages": user("a"), "tools": [3]}}, "tools[0]: expected"),
        ({"body": {"messages": user("a"), "response_format": "json"}}, "response_format: expected type text"),
        ({"body": {"messages": user("a"), "response_format": {"type": "json_schema"}}}, "json_schema.schema: expected"),
        ({"url": COMPLETIONS, "body": {"prompt": ["a", "b"]}}, "prompt: expected a text, got list"),
        ({"url": COMPLETIONS, "body": {"prompt": "a", "tools": []}}, "tools: not known in a batch"),
    ],
)
def test_an_openai_line_that_is_refused_gets_status_400(
    change: dict[str, Any], named: str, bundle: Path, write: Any, out: Path
) -> None:
    asked = {**openai("wrong"), **change}
    refusal(run(bundle, write(asked, openai("right", messages=user("soup"))), out))
    got = answers(out)
    assert got["right"]["response"]["status_code"] == 200
    assert got["wrong"]["response"]["status_code"] == 400
    assert named in got["wrong"]["error"]["message"]
    assert got["wrong"]["response"]["body"] == {"error": got["wrong"]["error"]}


def test_whatever_else_goes_wrong_ends_the_batch(
    bundle: Path, write: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("a bug")

    monkeypatch.setattr("coreinfer.runtime.scheduling.scheduler.post_token", fail)
    result = run(bundle, write({"prompt": "soup"}), out)
    assert isinstance(result.exception, ArithmeticError)
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["", " "], "expected JSON Lines, one request a line, got none; there is no line"),
        (["[", "1", "]"], "got none; line 1: no JSON"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b"}, openai("x")], "lines 1 and 3 have the same id 'x'"),
        ([{"prompt": "a"}, {"prompt": "b", "id": 1}], "lines 1 and 2 have the same id 1"),
    ],
)
def test_a_file_that_is_no_batch(lines: list[object], named: str, bundle: Path, write: Any, out: Path) -> None:
    assert named in refusal(run(bundle, write(*lines), out))
    assert not out.exists()


def test_seven_and_its_name_are_two_ids(bundle: Path, write: Any, out: Path) -> None:
    done(run(bundle, write({"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}), out))
    assert answers(out).keys() == {7, "7"}


def test_a_mark_and_line_ends_of_windows(bundle: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "batch").write_bytes(b'\xef\xbb\xbf{"prompt": "soup"}\r\n\r\n{"prompt": "flour"}')
    done(run(bundle, tmp_path / "batch", out))
    assert answers(out).keys() == {1, 3}


@pytest.mark.parametrize("more", [["hello"], ["--chat"], ["--system", "x"], ["--json"]])
def test_a_batch_goes_with_no_other_prompt(more: list[str], bundle: Path, write: Any, out: Path) -> None:
    assert "--batch cannot be used with PROMPT, --chat, --system or --json" in refusal(
        run(bundle, write({"prompt": "a"}), out, *more)
    )


def test_batch_and_output_go_together(bundle: Path, write: Any) -> None:
    for arguments in (["--batch", str(write({"prompt": "a"}))], ["-o", "x", "hello"]):
        assert "--batch and -o must be used together" in refusal(CliRunner().invoke(main, [str(bundle), *arguments]))


# Going on


def test_an_interrupted_batch_goes_on(bundle: Path, write: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"prompt": 3, "id": "wrong"}
    batch = write(*({"prompt": f"{number} soup", "raw": True} for number in range(6)), wrong, openai("o", n=2))
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


def test_other_requests_under_an_id_are_refused(bundle: Path, write: Any, out: Path) -> None:
    done(run(bundle, write({"prompt": "soup"}), out))
    before = out.read_bytes()
    for prompt, more in (("flour", []), ("soup", ["--temperature", "1"])):
        batch = write({"prompt": prompt})
        assert "it has an answer for id 1, to which line 1 of the batch, the options or the bundle" in refusal(
            run(bundle, batch, out, *more)
        )
        assert out.read_bytes() == before
    # More lines are welcome.
    done(run(bundle, write({"prompt": "soup"}, {"prompt": "flour"}), out))
    assert out.read_bytes().startswith(before)
    assert answers(out).keys() == {1, 2}


@pytest.mark.parametrize("text", ["mine\n", "mine", '{"id": 1}\n', '{"id": 1, "prompt": "x"}', '[{"id": 1}]\n', "3\n"])
def test_a_file_of_something_else_is_left_alone(text: str, bundle: Path, write: Any, out: Path) -> None:
    out.write_text(text, encoding="utf-8")
    assert "line 1: expected an answer of --batch, got" in refusal(run(bundle, write({"prompt": "soup"}), out))
    assert out.read_text(encoding="utf-8") == text


def test_outputs_that_cannot_be(bundle: Path, write: Any, out: Path, tmp_path: Path) -> None:
    batch = write({"prompt": "soup"})
    assert "it is the batch itself" in refusal(run(bundle, batch, batch))
    assert "cannot be written" in refusal(run(bundle, batch, tmp_path))
    assert "cannot be written" in refusal(run(bundle, batch, tmp_path / "no" / "where"))
    with out.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing it" in refusal(run(bundle, batch, out))
    assert json.loads(batch.read_text()) == {"prompt": "soup"}


def test_an_interrupt_leaves_whole_lines(bundle: Path, write: Any, out: Path) -> None:
    batch = write(*({"prompt": f"{number} {TEXTS[0]}"[:200], "raw": True} for number in range(3000)))
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


def test_nothing_is_left_in_the_engine(bundle: Path, write: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = runtime.load(bundle, engine="native", threads=1)
    writes = 0

    def interrupt(*_: object, **__: object) -> None:
        nonlocal writes
        writes += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "write", interrupt)
    batch = write(*({"prompt": f"{number} soup", "raw": True, "max_new_tokens": number + 1} for number in range(9)))
    with pytest.raises(KeyboardInterrupt):
        batch_file.answer_file(loaded, GenerationOptions(), batch, out)
    assert writes == 1
    assert (loaded.driver.scheduler.num_active, loaded.driver.scheduler.has_work) == (0, False)
    assert loaded.generate("soup", max_new_tokens=2).token_ids
