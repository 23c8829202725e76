"""What the server refuses, and fields that it takes because they change nothing."""

import json
from typing import Any

import openai
import pytest

from .engine_inputs import PROMPT
from .server_process import RunningServer, user

SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 12}


def refusal(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[int, str, str | None]:
    response = server.post(path, json=body)
    error = response.json()["error"]
    return response.status_code, error["message"], error["param"]


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        ({"prediction": {}}, "prediction: not supported by this server; leave it out", "prediction"),
        ({"n": 129}, "n: Input should be less than or equal to 128", "n"),
        ({"n": 66}, "n, prompt: this server returns at most 65 answers at once", "n"),
        ({"frequency_penalty": 3}, "frequency_penalty: Input should be less than or equal to 2", "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: Input should be less than or equal to 100", "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x: Input has characters", "logit_bias.x"),
        ({"logit_bias": {"999999": 1}}, "logit_bias: expected ids from 0 to", None),
        ({"store": True}, "store: Input should be False", "store"),
        ({"metadata": "a"}, "metadata: Input should be an object", "metadata"),
        ({"verbosity": "low"}, "verbosity: Input should be 'medium'", "verbosity"),
        ({"reasoning_effort": "high"}, "reasoning_effort: Input should be 'none'", "reasoning_effort"),
        ({"service_tier": "flex"}, "service_tier: Input should be 'auto' or 'default'", "service_tier"),
        ({"functions": [{"name": "f"}]}, "functions: List should have at most 0 items", "functions"),
        ({"tool_choice": "required"}, "tool_choice: it requires a call, but there are no tools", None),
        (
            {"tool_choice": {"type": "allowed_tools"}},
            "tool_choice.type: Input should be 'function'",
            "tool_choice.type",
        ),
        ({"tools": [{"type": "custom"}]}, "tools.0.type: Input should be 'function'", "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: Input", None),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2", "temperature"),
        ({"temperature": "1"}, "temperature: Input should be a valid number", "temperature"),
        ({"top_p": 0}, "top_p: Input should be greater than 0", "top_p"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0", "seed"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1", "max_tokens"),
        ({"max_tokens": 65}, "max_tokens: this server allows at most 64, got 65", "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens, max_completion_tokens: give one of the two", None),
        ({"top_logprobs": 2}, "top_logprobs: only with logprobs true", None),
        ({"stream_options": {"include_usage": True}}, "stream_options: include_usage only with stream true", None),
        (
            {"mode": "fast"},
            "mode: Input should be 'auto', 'similarity', 'stability', 'fused', 'dense' or 'lossless'",
            "mode",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format: json_schema: expected exactly with type",
            "response_format",
        ),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        (
            {"messages": [{"role": "function", "content": "x"}]},
            "messages.0.role: Input should be 'system'",
            "messages.0.role",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0: tool_call_id: expected exactly on",
            "messages.0",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0: content: expected text or a list", "messages.0"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0: content: expected", "messages.0"),
        (
            {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
            "messages.0.refusal: not supported",
            "messages.0.refusal",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: Input should be 'text'; messages.0.content.0.text: Field required",
            "messages.0.content.0.type",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: Input should be a string or Input should be a list",
            "messages.0.content",
        ),
        ({"messages": "x"}, "messages: Input should be a list", "messages"),
        ({"messages": ["x"]}, "messages.0: Input should be an object", "messages.0"),
        ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character", "stop.1"),
        ({"stop": ["a", 1]}, "stop.1: Input should be a string", "stop.1"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items", "stop"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", None),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "prompt: expected 1 to 255 tokens, got", None),
        ({"\ud800": 1}, "Input should be a valid string", None),
    ],
)
def test_what_is_not_supported_is_refused(
    server: RunningServer, model: str, change: dict[str, Any], message: str, param: str | None
) -> None:
    # As ASCII: some are no text that UTF-8 could hold.
    body = json.dumps({"model": model, "messages": user("x")} | change)
    response = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert not [text for text in ("0x", "[str", "function-", "constrained", "TextPart") if text in error["message"]]


def test_fields_that_change_nothing_are_taken(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=user(PROMPT),
        n=1,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        user="someone",
        response_format={"type": "text"},
        store=False,
        metadata=None,
        parallel_tool_calls=True,
        service_tier="auto",
        safety_identifier="someone",
        prompt_cache_key="some key",
        verbosity="medium",
        modalities=["text"],
        stream_options={"include_usage": False},
        tools=[],
        tool_choice="none",
        function_call="none",
        functions=[],
        extra_body={"top_logprobs": 0, "audio": None, "metadata": {"user": "7"}, "no_such_field": None, "stream": None},
        **SEEDED,
    )
    plain = client.chat.completions.create(model=model, messages=user(PROMPT), **SEEDED)
    assert answer.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    "change", [{"echo": True, "logprobs": 1}, {"suffix": "x"}, {"best_of": 2}, {"prompt": []}, {"prompt": ""}]
)
def test_completions_refuse_what_they_lack(server: RunningServer, model: str, change: dict[str, Any]) -> None:
    status, message, _ = refusal(server, "/v1/completions", {"model": model, "prompt": "x"} | change)
    assert status == 400
    assert next(iter(change)) in message


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[1]", b"null", b"[" * 200_000])
def test_bodies_that_are_no_request(server: RunningServer, body: bytes) -> None:
    response = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_other_statuses_have_the_same_shape(server: RunningServer, model: str) -> None:
    assert server.get("/nothing").json()["error"]["message"] == "Not Found"
    response = server.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = server.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    for content_type in ("Application/JSON", 'application/json; Charset="UTF-8"', "APPLICATION/json;charset=utf-8"):
        body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1})
        response = server.post("/v1/completions", content=body.encode(), headers={"Content-Type": content_type})
        assert response.status_code == 200, response.text
    response = server.post("/v1/completions", json={}, headers={"Host": "elsewhere.example"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_host")


def test_without_leave_no_page_from_elsewhere_reads_an_answer(server: RunningServer) -> None:
    response = server.post("/v1/completions", json={}, headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in response.headers if name.startswith("access-control-")]
