"""Ollama's interface, asked by its own client and by hand: the same answers as the library's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from coreinfer import runtime
from coreinfer.server.requests.ollama_bodies import OllamaMessageIn
from coreinfer.server.requests.ollama_prompts import chat_prompt

from .engine_inputs import PROMPT
from .server_process import JSON, RunningServer, serving

NUM_TOKENS = 8
ASK = [{"role": "user", "content": PROMPT}]
GREEDY = {"temperature": 0, "num_predict": NUM_TOKENS}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell it.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def server(long_bundle: Path) -> Iterator[RunningServer]:
    with serving(long_bundle, "--max-new-tokens", 64) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def name(long_bundle: Path) -> str:
    return long_bundle.name


@pytest.fixture(scope="module")
def engine(long_bundle: Path) -> runtime.Engine:
    return runtime.load(long_bundle, engine="native", threads=1)


def post(server: RunningServer, path: str, body: dict[str, Any], status: int = 200) -> Any:
    response = server.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.parametrize("suffix", ["", ":latest"])
def test_a_chat(client: ollama.Client, engine: runtime.Engine, name: str, suffix: str) -> None:
    expected = engine.generate(ASK, max_new_tokens=NUM_TOKENS)
    answer = client.chat(model=name + suffix, messages=ASK, options=GREEDY)
    assert answer.message.content == expected.text
    assert (answer.message.role, answer.done, answer.done_reason) == ("assistant", True, expected.finish_reason)
    assert (answer.prompt_eval_count, answer.eval_count) == (expected.num_prompt_tokens, len(expected.token_ids))
    assert answer.total_duration is not None
    assert answer.total_duration > 0


def test_a_stream(client: ollama.Client, engine: runtime.Engine, name: str) -> None:
    expected = engine.generate(ASK, max_new_tokens=NUM_TOKENS)
    parts = list(client.chat(model=name, messages=ASK, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) == len(expected.token_ids)
    assert (parts[0].eval_count, parts[-1].eval_count) == (None, len(parts))


def test_lines_are_json_and_say_nothing_that_they_do_not_know(server: RunningServer, name: str) -> None:
    body = {"model": name, "messages": ASK, "options": GREEDY}
    response = server.post("/api/chat", content=json.dumps(body), headers=JSON)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert set(lines[0]) == {"model", "created_at", "message", "done"}
    assert lines[-1]["done_reason"] in ("stop", "length")


@pytest.mark.parametrize("options", [{"system": "Be kind."}, {"raw": True}, {}])
def test_generate(client: ollama.Client, engine: runtime.Engine, name: str, options: dict[str, Any]) -> None:
    prompt: Any = PROMPT
    if "system" in options:
        prompt = [{"role": "system", "content": options["system"]}, *ASK]
    expected = engine.generate(prompt, max_new_tokens=NUM_TOKENS, raw=bool(options.get("raw")))
    whole = client.generate(model=name, prompt=PROMPT, options=GREEDY, **options)
    assert whole.response == expected.text
    parts = client.generate(model=name, prompt=PROMPT, options=GREEDY, stream=True, **options)
    assert "".join(part.response or "" for part in parts) == expected.text


def test_options_mean_what_they_mean_elsewhere(client: ollama.Client, engine: runtime.Engine, name: str) -> None:
    drawn = {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "seed": 5, "repeat_penalty": 1.2}
    expected = engine.generate(
        ASK, max_new_tokens=NUM_TOKENS, temperature=1.3, top_k=9, top_p=0.8, seed=5, repetition_penalty=1.2
    )
    options = {**drawn, "num_predict": NUM_TOKENS, "num_ctx": 4096, "num_thread": 3}
    assert client.chat(model=name, messages=ASK, options=options).message.content == expected.text
    # As many as there may be: the server's limit.
    endless = client.chat(model=name, messages=ASK, options={"temperature": 0, "num_predict": -1})
    assert (endless.eval_count is not None and endless.eval_count == 64) or endless.done_reason == "stop"


def test_a_format_is_followed(client: ollama.Client, name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    answer = client.chat(model=name, messages=ASK, format=schema, options={"temperature": 0})
    assert json.loads(answer.message.content or "") == {"a": 1}


def test_calls_and_their_results_become_messages() -> None:
    said = [
        {"role": "user", "content": "Both?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": each, "arguments": {"x": 1}}} for each in ("first", "second")],
        },
        {"role": "tool", "content": "two", "tool_name": "second"},
        {"role": "tool", "content": "one"},
    ]
    messages = chat_prompt([OllamaMessageIn.model_validate(message) for message in said])
    first, second = messages[1]["tool_calls"]
    assert first["function"] == {"name": "first", "arguments": '{"x": 1}'}
    assert [message["tool_call_id"] for message in messages[2:]] == [second["id"], first["id"]]


def test_tools_are_offered(client: ollama.Client, engine: runtime.Engine, name: str) -> None:
    expected = engine.generate(ASK, max_new_tokens=NUM_TOKENS, tools=[TOOL])
    answer = client.chat(model=name, messages=ASK, tools=[TOOL], options=GREEDY)
    assert (answer.prompt_eval_count, answer.message.content) == (expected.num_prompt_tokens, expected.text)


def test_what_there_is(client: ollama.Client, server: RunningServer, name: str) -> None:
    (tag,) = client.list().models
    assert (tag.model, tag.details.family if tag.details else "") == (name, "llama")
    assert [model.model for model in client.ps().models] == [name]
    shown = client.show(name)
    assert "completion" in (shown.capabilities or [])
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert server.get("/api/version").json().keys() == {"version"}


@pytest.mark.parametrize(
    ("path", "change", "status", "said"),
    [
        ("/api/chat", {"model": "other"}, 404, "no model 'other' here"),
        ("/api/chat", {"options": {"mirostat": 2}}, 400, "options.mirostat"),
        ("/api/chat", {"options": {"wrong": 2}}, 400, "options.wrong: not supported by this server"),
        ("/api/chat", {"messages": []}, 400, "messages"),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, 400, "images"),
        ("/api/chat", {"think": True}, 400, "think"),
        ("/api/generate", {"template": "{{ .Prompt }}"}, 400, "template"),
        ("/api/generate", {"raw": True, "system": "a"}, 400, "raw, system"),
        ("/api/generate", {"prompt": "word " * 4000}, 400, "tokens"),
        ("/api/pull", {}, 404, "Not Found"),
    ],
)
def test_errors_are_one_line_of_text(
    server: RunningServer, name: str, path: str, change: dict[str, Any], status: int, said: str
) -> None:
    asked = {"messages": ASK} if path == "/api/chat" else {"prompt": PROMPT}
    answer = post(server, path, {"model": name, **asked, **change}, status)
    assert said in answer["error"]
    assert answer.keys() == {"error"}


def test_the_client_raises_what_is_wrong(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'other' here"):
        client.chat(model="other", messages=ASK)


def test_a_key_is_asked_for(long_bundle: Path) -> None:
    with serving(long_bundle, key="sesame") as running:
        answer = running.get("/api/tags")
        assert (answer.status_code, answer.json().keys()) == (401, {"error"})
        assert isinstance(answer.json()["error"], str)
        headers = {"Authorization": "Bearer sesame"}
        with ollama.Client(host=running.url, headers=headers) as client:
            assert client.list().models
