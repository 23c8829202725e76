"""The server as clients of OpenAI's interface use it: turns, tools, several answers, pages of other origins."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from coreinfer import runtime

from .engine_inputs import PROMPT
from .server_process import RunningServer, serving

SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 12}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def server(long_bundle: Path) -> Iterator[RunningServer]:
    with serving(long_bundle, "--cors-origin", ORIGIN, "--any-model", "--queue", 6) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def engine(long_bundle: Path) -> runtime.Engine:
    return runtime.load(long_bundle, engine="native", threads=1)


def ask(text: str = PROMPT) -> list[Any]:
    return [{"role": "user", "content": text}]


# Turns


def test_an_answer_is_a_message_of_the_next_turn(client: openai.OpenAI, engine: runtime.Engine) -> None:
    messages = ask()
    answer = client.chat.completions.create(model="m", messages=messages, **SEEDED).choices[0].message
    messages.append(answer)
    messages.append({"role": "user", "content": "And the sea?", "name": "Anna"})
    second = client.chat.completions.create(model="m", messages=messages, **SEEDED)
    plain = [*ask(), {"role": "assistant", "content": answer.content}, {"role": "user", "content": "And the sea?"}]
    expected = engine.generate(plain, max_new_tokens=12, temperature=0.9, seed=7)
    assert second.choices[0].message.content == expected.text
    whole = {
        "role": "assistant",
        "content": answer.content,
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "audio": None,
        "annotations": [],
        "name": "Bot",
        "reasoning_content": None,
    }
    again = client.chat.completions.create(model="m", messages=[messages[0], whole, messages[2]], **SEEDED)  # type: ignore[list-item]
    assert again.choices[0].message.content == expected.text


def test_how_a_conversation_is_written(client: openai.OpenAI, engine: runtime.Engine) -> None:
    begun = [*ask(), {"role": "assistant", "content": "The tide"}]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
        ({"continue_final_message": False, "add_generation_prompt": True}, {"continue_final_message": False}),
        ({"skip_special_tokens": False, "parse_special": True}, {"skip_special_tokens": False, "parse_special": True}),
    ]
    for extra, options in cases:
        answer = client.chat.completions.create(model="m", messages=begun, extra_body=extra, **SEEDED)
        expected = engine.generate(begun, max_new_tokens=12, temperature=0.9, seed=7, **options)
        assert answer.choices[0].message.content == expected.text
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt: expected the contrary"):
        client.chat.completions.create(model="m", messages=begun, extra_body={"add_generation_prompt": False})
    unknown: Any = {"chat_template_kwargs": {"thinking": True}}
    with pytest.raises(openai.BadRequestError, match=r"chat_template_kwargs: .* knows no thinking"):
        client.chat.completions.create(model="m", messages=begun, extra_body=unknown)


# Tools


def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    messages = ask("What is it like in Rome?")
    options: dict[str, Any] = {"model": "m", "tools": TOOLS, "temperature": 1.0, "seed": 3, "max_tokens": 80}
    answer = client.chat.completions.create(messages=messages, tool_choice=NAMED, **options)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = client.chat.completions.create(messages=messages, **options)
    assert after.usage is not None
    assert answer.usage is not None
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens + 10


def test_calls_are_streamed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "m", "messages": ask(), "tools": TOOLS, "seed": 5, "max_tokens": 80}
    whole = client.chat.completions.create(tool_choice="required", **options).choices[0].message.tool_calls
    chunks = list(client.chat.completions.create(tool_choice="required", stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert whole is not None
    assert len(calls) == 1
    assert (calls[0].index, calls[0].type) == (0, "function")
    assert calls[0].id
    assert calls[0].function is not None
    assert whole[0].type == "function"
    assert calls[0].function.name == whole[0].function.name
    assert calls[0].function.arguments == whole[0].function.arguments
    assert not "".join(delta.content or "" for delta in deltas).strip()
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_no_tools_where_none_are_to_be_called(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "m", "messages": ask(), **SEEDED}
    without = client.chat.completions.create(**options)
    none = client.chat.completions.create(tools=TOOLS, tool_choice="none", **options)
    assert none.choices[0].message.content == without.choices[0].message.content
    told = client.chat.completions.create(tools=TOOLS, **options)
    assert none.usage is not None
    assert told.usage is not None
    assert told.usage.prompt_tokens > none.usage.prompt_tokens + 50
    assert told.choices[0].finish_reason == "length"
    assert told.choices[0].message.tool_calls is None


# Several answers


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI, engine: runtime.Engine) -> None:
    expected = [
        engine.generate(PROMPT, raw=True, max_new_tokens=12, temperature=0.9, seed=seed).text for seed in (7, 8, 9)
    ]
    assert len(set(expected)) == 3
    whole = client.completions.create(model="m", prompt=PROMPT, n=3, best_of=3, **SEEDED)
    assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(expected))
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens < 100
    texts = ["", "", ""]
    chunks = list(
        client.completions.create(
            model="m", prompt=PROMPT, n=3, stream=True, stream_options={"include_usage": True}, **SEEDED
        )
    )
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    assert chunks[-1].usage is not None
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 36)
    chat = client.chat.completions.create(model="m", messages=ask(), n=2, **SEEDED)
    told = [engine.generate(ask(), max_new_tokens=12, temperature=0.9, seed=seed).text for seed in (7, 8)]
    assert [(choice.index, choice.message.content) for choice in chat.choices] == list(enumerate(told))


def test_several_prompts(client: openai.OpenAI, engine: runtime.Engine) -> None:
    prompts = [PROMPT, "The sea"]
    answer = client.completions.create(model="m", prompt=prompts, max_tokens=6, temperature=0)
    expected = [engine.generate(prompt, raw=True, max_new_tokens=6) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [got.text for got in expected]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(got.num_prompt_tokens for got in expected)


def test_more_answers_than_places_are_refused_and_leave_none_behind(
    client: openai.OpenAI, server: RunningServer
) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 7 answers at once"):
        client.completions.create(model="m", prompt="x", n=8, max_tokens=1)
    assert client.completions.create(model="m", prompt="x", n=7, max_tokens=1).choices[6].index == 6


def test_echo(client: openai.OpenAI, engine: runtime.Engine) -> None:
    expected = PROMPT + engine.generate(PROMPT, raw=True, max_new_tokens=6).text
    options: dict[str, Any] = {"model": "m", "prompt": PROMPT, "echo": True, "max_tokens": 6, "temperature": 0}
    assert client.completions.create(**options).choices[0].text == expected
    chunks = client.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_penalties_and_biases(client: openai.OpenAI, engine: runtime.Engine) -> None:
    first = engine.generate(PROMPT, raw=True, max_new_tokens=30).token_ids[0]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 2.0}, {"frequency_penalty": 2}),
        ({"logit_bias": {first: -100.0}}, {"logit_bias": {str(first): -100}}),
    ]
    for ours, theirs in cases:
        expected = engine.generate(PROMPT, raw=True, max_new_tokens=30, **ours)
        answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=30, temperature=0, **theirs)
        assert answer.choices[0].text == expected.text
    assert first not in expected.token_ids


# Errors


def test_what_does_not_fit_into_the_context(client: openai.OpenAI) -> None:
    cases: list[dict[str, Any]] = [
        {"prompt": "word " * 3000},
        # So many characters that they are not even tokenized.
        {"prompt": "word " * 100_000},
        {"prompt": "x " * 100, "max_tokens": 2040},
    ]
    for options in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="m", **options)
        assert caught.value.code == "context_length_exceeded"
    # What a client did not ask for need not fit.
    assert client.chat.completions.create(model="m", messages=ask(), max_tokens=3).choices


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"temperature": 9}, "invalid_value"),
        ({"temperature": "1"}, "invalid_type"),
        ({"prediction": 1}, "unknown_parameter"),
        ({"messages": [{"content": "x"}]}, "missing_required_parameter"),
    ],
)
def test_codes(server: RunningServer, change: dict[str, Any], code: str) -> None:
    response = server.post("/v1/chat/completions", json={"model": "m", "messages": ask()} | change)
    assert response.json()["error"]["code"] == code
    assert response.status_code == 400


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"anyOf": [{"$ref": "#"}]},
        {"$ref": "http://elsewhere.example/schema"},
    ],
)
def test_schemas_that_nothing_follows(server: RunningServer, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = server.post("/v1/chat/completions", json={"model": "m", "messages": ask(), "response_format": form})
    assert response.status_code == 400, response.text
    assert "\n" not in response.json()["error"]["message"]
    assert response.json()["error"]["message"].startswith("json_schema: ")


# Access


def test_any_name_is_answered(client: openai.OpenAI, server: RunningServer) -> None:
    (card,) = client.models.list()
    assert client.completions.create(model="gpt-4o", prompt="x", max_tokens=1).model == card.id
    assert client.models.retrieve("gpt-4o").id == card.id


def test_head(server: RunningServer) -> None:
    for path in ("/health", "/v1/models", "/"):
        response = httpx.head(server.url + path, timeout=30)
        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) > 0
    assert httpx.head(f"{server.url}/v1/completions", timeout=30).status_code == 405


def test_http_1_0_without_a_host(server: RunningServer) -> None:
    def status(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(request)
            return connection.recv(4096).split(b" ")[1]

    assert status(b"GET /health HTTP/1.0\r\n\r\n") == b"200"
    assert status(b"GET /health HTTP/1.0\r\nHost: elsewhere.example\r\n\r\n") == b"403"
    assert status(b"GET /health HTTP/1.1\r\n\r\n") == b"400"


def test_pages_of_an_origin_that_may_ask(server: RunningServer) -> None:
    question = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = httpx.request("OPTIONS", f"{server.url}/v1/completions", headers=question, timeout=30)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    refused = httpx.request(
        "OPTIONS", f"{server.url}/v1/completions", headers=question | {"Origin": "https://other.example"}, timeout=30
    )
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    for body, status in (({"model": "m", "prompt": "x", "max_tokens": 1}, 200), ({}, 400)):
        answer = server.post("/v1/completions", json=body, headers={"Origin": ORIGIN})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_preflights_need_no_key_but_requests_do(bundle: Path) -> None:
    with serving(bundle, "--cors-origin", "*", key="sesame") as guarded:
        question = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
        url = f"{guarded.url}/v1/models"
        assert httpx.request("OPTIONS", url, headers=question, timeout=30).status_code == 200
        refused = httpx.get(url, headers={"Origin": ORIGIN}, timeout=30)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "*"
