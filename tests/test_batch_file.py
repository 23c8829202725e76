"""`coreinfer-run --batch`: a file of requests, answered many at once."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.runtime.commands import batch_answering
from coreinfer.runtime.scheduling.scheduler import Scheduler

from .batch_commands import COMPLETIONS, answers, done, openai, run, user
from .model_factory import corpus_texts

TEXTS = corpus_texts()
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}, "strict": True}}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_every_line_gets_the_answer_that_it_would_get_alone(
    bundle: Path, engine: runtime.Engine, write_lines: Any, out: Path
) -> None:
    own: list[dict[str, Any]] = [
        {"prompt": TEXTS[0]},
        {"messages": user(TEXTS[1]), "id": "second", "max_new_tokens": 5},
        {"prompt": TEXTS[2], "raw": True, "temperature": 0.8, "seed": 3, "top_k": 50},
        {"prompt": TEXTS[3], "mode": "dense", "logit_bias": {"7": 4.0}, "stop": ["e"]},
        {"prompt": TEXTS[0], "id": 77, "logprobs": 2, "mode": "fused"},
    ]
    batch = write_lines(own[0], "", *own[1:])
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


def test_openai_lines(bundle: Path, engine: runtime.Engine, write_lines: Any, out: Path) -> None:
    settled: dict[str, Any] = {"temperature": 0, "n": 1, "stream": False, "stop": None, "user": "me"}
    parts = [{"type": "text", "text": "Speak"}, {"type": "text", "text": "of law."}]
    messages = [{"role": "developer", "content": parts}, *user(TEXTS[0])]
    batch = write_lines(
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


def test_openai_calls(long_bundle: Path, write_lines: Any, out: Path) -> None:
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "look_up"}}
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    batch = write_lines(
        openai("call", messages=user("soup"), tools=[TOOL], tool_choice=named, max_tokens=200, temperature=0),
        openai("form", messages=user("soup"), response_format=form, max_tokens=200, temperature=0),
    )
    done(run(long_bundle, batch, out))
    got = {name: line["response"]["body"]["choices"][0] for name, line in answers(out).items()}
    assert json.loads(got["form"]["message"]["content"]) == {"a": 1}
    if got["call"]["finish_reason"] != "length":
        call = got["call"]["message"]["tool_calls"][0]
        assert (got["call"]["finish_reason"], call["function"]["name"]) == ("tool_calls", "look_up")


def test_openai_clients_read_the_answers(bundle: Path, write_lines: Any, out: Path) -> None:
    chat = pytest.importorskip("openai.types.chat").ChatCompletion
    text = pytest.importorskip("openai.types").Completion
    done(run(bundle, write_lines(openai("a", messages=user("soup")), openai("b", COMPLETIONS, prompt="soup")), out))
    got = answers(out)
    assert chat.model_validate(got["a"]["response"]["body"]).choices[0].message.role == "assistant"
    assert text.model_validate(got["b"]["response"]["body"]).choices[0].text


def test_more_lines_than_are_open_at_once(
    bundle: Path, engine: runtime.Engine, write_lines: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_answering, "_MAX_OPEN", 3)
    most = 0
    submit = runtime.Engine.submit

    def counted(self: runtime.Engine, *arguments: Any, **keywords: Any) -> Any:
        nonlocal most
        scheduler = self.driver.scheduler
        most = max(most, scheduler.num_active + scheduler.num_waiting)
        return submit(self, *arguments, **keywords)

    monkeypatch.setattr(runtime.Engine, "submit", counted)
    done(run(bundle, write_lines(*({"prompt": f"{number} soup", "raw": True} for number in range(12))), out))
    got = answers(out)
    assert got.keys() == set(range(1, 13))
    for number in range(12):
        assert got[number + 1]["text"] == engine.generate(f"{number} soup", raw=True, max_new_tokens=9).text
    # Those that ended in the step under way are still counted.
    assert most <= 2 * 3


def test_answers_come_as_they_end(bundle: Path, write_lines: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, num_submitted = threading.Event(), 0
    submit, step = runtime.Engine.submit, Scheduler.step

    def counted(self: runtime.Engine, *arguments: Any, **keywords: Any) -> Any:
        nonlocal num_submitted
        found = submit(self, *arguments, **keywords)
        num_submitted += 1
        if num_submitted == 2:
            both.set()
        return found

    def held(self: Scheduler) -> None:
        # The first would else end before a busy machine submits the second.
        assert both.wait(timeout=60)
        step(self)

    monkeypatch.setattr(runtime.Engine, "submit", counted)
    monkeypatch.setattr(Scheduler, "step", held)
    batch = write_lines(
        {"prompt": TEXTS[0], "max_new_tokens": 60, "raw": True}, {"prompt": TEXTS[0], "max_new_tokens": 1}
    )
    done(run(bundle, batch, out))
    assert list(answers(out)) == [2, 1]
