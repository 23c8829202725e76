"""`coreinfer-run --batch`: lines and files that cannot be answered."""

from pathlib import Path
from typing import Any

import pytest

from .batch_commands import COMPLETIONS, answers, done, invoke, openai, refusal, run, user
from .model_factory import corpus_texts

TEXTS = corpus_texts()
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}, "strict": True}}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


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
    line: object, named: str, bundle: Path, write_lines: Any, out: Path
) -> None:
    result = run(bundle, write_lines({"prompt": TEXTS[0]}, line, {"prompt": TEXTS[1]}), out)
    assert refusal(result).endswith(f"lines.jsonl were not answered; {out} says why at each")
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
    change: dict[str, Any], named: str, bundle: Path, write_lines: Any, out: Path
) -> None:
    asked = {**openai("wrong"), **change}
    refusal(run(bundle, write_lines(asked, openai("right", messages=user("soup"))), out))
    got = answers(out)
    assert got["right"]["response"]["status_code"] == 200
    assert got["wrong"]["response"]["status_code"] == 400
    assert named in got["wrong"]["error"]["message"]
    assert got["wrong"]["response"]["body"] == {"error": got["wrong"]["error"]}


def test_whatever_else_goes_wrong_ends_the_batch(
    bundle: Path, write_lines: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("a bug")

    monkeypatch.setattr("coreinfer.runtime.scheduling.scheduler.post_token", fail)
    result = run(bundle, write_lines({"prompt": "soup"}), out)
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
def test_a_file_that_is_no_batch(lines: list[object], named: str, bundle: Path, write_lines: Any, out: Path) -> None:
    assert named in refusal(run(bundle, write_lines(*lines), out))
    assert not out.exists()


def test_seven_and_its_name_are_two_ids(bundle: Path, write_lines: Any, out: Path) -> None:
    done(run(bundle, write_lines({"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}), out))
    assert answers(out).keys() == {7, "7"}


def test_a_mark_and_line_ends_of_windows(bundle: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "batch").write_bytes(b'\xef\xbb\xbf{"prompt": "soup"}\r\n\r\n{"prompt": "flour"}')
    done(run(bundle, tmp_path / "batch", out))
    assert answers(out).keys() == {1, 3}


@pytest.mark.parametrize("more", [["hello"], ["--chat"], ["--system", "x"], ["--json"]])
def test_a_batch_goes_with_no_other_prompt(more: list[str], bundle: Path, write_lines: Any, out: Path) -> None:
    assert "--batch cannot be used with PROMPT, --chat, --system or --json" in refusal(
        run(bundle, write_lines({"prompt": "a"}), out, *more)
    )


def test_batch_and_output_go_together(bundle: Path, write_lines: Any) -> None:
    for arguments in (["--batch", str(write_lines({"prompt": "a"}))], ["-o", "x", "hello"]):
        assert "--batch and -o must be used together" in refusal(invoke(bundle, *arguments))
