"""The server's routes, asked by OpenAI's own client and by hand."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from coreinfer import runtime

from .engine_inputs import DIALOGUE, PROMPT
from .model_factory import corpus_texts
from .server_process import RunningServer, serving

OTHER = "The law text number 7 speaks of court and judge and verdict."
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with serving(bundle, "--max-new-tokens", 64) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def model(bundle: Path) -> str:
    return bundle.name


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def refusal(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[int, str, str | None]:
    response = server.post(path, json=body)
    error = response.json()["error"]
    return response.status_code, error["message"], error["param"]


# Answers


def test_a_chat_is_answered_as_the_engine_answers_it(client: openai.OpenAI, engine: runtime.Engine, model: str) -> None:
    messages: list[Any] = DIALOGUE
    answer = client.chat.completions.create(model=model, messages=messages, extra_body={"top_k": 50}, **SEEDED)
    expected = engine.generate(DIALOGUE, max_new_tokens=12, temperature=0.9, seed=7, top_k=50)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == expected.num_prompt_tokens + len(expected.token_ids)
    own = answer.to_dict()["coreinfer"]
    assert isinstance(own, dict)
    assert (own["cluster"], own["label"], own["mode"]) == (expected.cluster, expected.cluster_label, expected.mode)
    assert own["distance"] == pytest.approx(expected.distance)


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=user(PROMPT), **SEEDED)
    chunks = list(
        client.chat.completions.create(
            model=model, messages=user(PROMPT), stream=True, stream_options={"include_usage": True}, **SEEDED
        )
    )
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in told if choice.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    own = [chunk.to_dict().get("coreinfer") for chunk in chunks[:-1]]
    assert own[0]
    assert own[-1]
    assert not any(own[1:-1])


def test_no_usage_in_a_stream_that_did_not_ask(client: openai.OpenAI, model: str) -> None:
    chunks = list(client.chat.completions.create(model=model, messages=user(PROMPT), stream=True, max_tokens=3))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_completions(client: openai.OpenAI, engine: runtime.Engine, model: str) -> None:
    expected = engine.generate(PROMPT, raw=True, max_new_tokens=12, temperature=0.9, seed=7)
    whole = client.completions.create(model=model, prompt=PROMPT, **SEEDED)
    assert whole.choices[0].text == expected.text
    chunks = client.completions.create(model=model, prompt=[PROMPT], stream=True, **SEEDED)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    short = client.completions.create(model=model, prompt=PROMPT, temperature=0)
    assert short.usage is not None
    assert short.usage.completion_tokens <= 16


def test_stop_strings(client: openai.OpenAI, engine: runtime.Engine, model: str) -> None:
    text = engine.generate(PROMPT, raw=True, max_new_tokens=20, temperature=0).text
    stop = text[len(text) // 2 :][:3]
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_of_a_chat(client: openai.OpenAI, engine: runtime.Engine, model: str) -> None:
    options: dict[str, Any] = {"messages": user(PROMPT), "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    answer = client.chat.completions.create(model=model, temperature=0, **options)
    expected = engine.generate(user(PROMPT), max_new_tokens=5, logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert [entry.logprob for entry in content] == pytest.approx(list(expected.logprobs))
    assert [entry.top_logprobs[0].token for entry in content] == [entry.token for entry in content]
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in content)
    chunks = list(client.chat.completions.create(model=model, temperature=0, stream=True, **options))
    streamed = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content


def test_logprobs_of_a_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0, logprobs=2, max_tokens=5)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens
    assert told.token_logprobs
    assert told.top_logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset or []) == 5
    assert all(
        max(top.values()) == pytest.approx(logprob)
        for top, logprob in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )


def test_an_answer_that_follows_a_schema(client: openai.OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=user(PROMPT),
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        max_tokens=40,
        temperature=0,
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)


def test_parts_and_developer_messages(client: openai.OpenAI, engine: runtime.Engine, model: str) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Speak of ships."},
        {"role": "user", "content": [{"type": "text", "text": "The sea"}, {"type": "text", "text": "and the harbour"}]},
    ]
    plain = [{"role": "system", "content": "Speak of ships."}, {"role": "user", "content": "The sea\nand the harbour"}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == engine.generate(plain, max_new_tokens=8).text


def test_models(client: openai.OpenAI, model: str) -> None:
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).owned_by == "coreinfer"
    with pytest.raises(openai.NotFoundError, match="no model 'none' here; there is"):
        client.models.retrieve("none")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="none", messages=user("x"))
    assert caught.value.code == "model_not_found"


# Refusals


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


# Beside OpenAI's interface


def test_health(server: RunningServer, model: str) -> None:
    health = server.get("/health").json()
    assert health.pop("version")
    assert health == {"status": "ok", "models": [model], "key_required": False}


def test_map_and_place(server: RunningServer, engine: runtime.Engine, model: str) -> None:
    shown = server.get(f"/coreinfer/map?model={model}").json()
    assert [point["label"] for point in shown["clusters"]] == [c.label for c in engine.manifest.clusters]
    place = server.post("/coreinfer/place", json={"model": model, "text": OTHER}).json()
    assert place["cluster"] == engine.router.route(OTHER).cluster
    assert place["distances"] == pytest.approx(list(engine.router.distances(OTHER)))
    assert sum(place["weights"]) == pytest.approx(1)
    assert max(range(len(place["weights"])), key=place["weights"].__getitem__) == place["cluster"]
    for axis in ("x", "y"):
        places = [point[axis] for point in shown["clusters"]]
        assert min(places) <= place[axis] <= max(places)
        mean = math.fsum(w * p for w, p in zip(place["weights"], places, strict=True))
        assert place[axis] == pytest.approx(mean)


def test_metrics_count_what_happened(server: RunningServer, client: openai.OpenAI, model: str) -> None:
    def counts() -> list[float]:
        return [
            server.metric("coreinfer_http_requests_total", route="/v1/completions", status="200"),
            server.metric("coreinfer_generations_total", model=model),
            server.metric("coreinfer_completion_tokens_total", model=model),
            server.metric("coreinfer_cluster_hits_total", model=model),
            server.metric("coreinfer_distance_count", model=model),
            server.metric("coreinfer_first_token_seconds_count", model=model),
            server.metric("coreinfer_request_seconds_count", route="/v1/completions"),
        ]

    before = counts()
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0)
    assert answer.usage is not None
    num_tokens = answer.usage.completion_tokens
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [1, 1, num_tokens, 1, 1, 1, 1]
    assert server.metric("coreinfer_queue_length", model=model) == 0


def test_swaps_are_counted(server: RunningServer, client: openai.OpenAI, model: str, engine: runtime.Engine) -> None:
    options: dict[str, Any] = {"model": model, "max_tokens": 2, "temperature": 0, "extra_body": {"mode": "similarity"}}
    # What becomes of a text that lies between two clusters depends on the CPU.
    own = engine.router.route(PROMPT).cluster
    other = next(text for text in corpus_texts() if engine.router.route(text).cluster != own)
    client.completions.create(prompt=PROMPT, **options)
    before = server.metric("coreinfer_swaps_total", model=model)
    for prompt in (PROMPT, other, other, PROMPT):
        client.completions.create(prompt=prompt, **options)
    assert server.metric("coreinfer_swaps_total", model=model) - before == 2


def test_an_unknown_path_does_not_become_a_label(server: RunningServer) -> None:
    server.get("/wp-admin.php")
    assert "wp-admin" not in server.get("/metrics").text


def test_a_key_guards_all_but_page_and_health(bundle: Path) -> None:
    with serving(bundle, key="sesame") as server:
        assert [server.get(path).status_code for path in ("/", "/health", "/openapi.json")] == [200, 200, 200]
        assert server.get("/health").json()["key_required"]
        paths = ("/v1/models", "/metrics", f"/coreinfer/map?model={bundle.name}", "/nothing")
        assert [server.get(path).status_code for path in paths] == [401] * 4
        with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.completions.create(model=bundle.name, prompt="x")
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        with server.client() as client:
            assert client.completions.create(model=bundle.name, prompt="x", max_tokens=2).choices


def test_two_bundles_side_by_side(tiny_bundle: Callable[..., Path]) -> None:
    paths = [tiny_bundle("llama"), tiny_bundle("qwen2")]
    with serving(*paths) as server, server.client() as client:
        assert [card.id for card in client.models.list()] == [path.name for path in paths]
        for path in paths:
            expected = runtime.load(path, engine="native", threads=1).generate(PROMPT, raw=True, max_new_tokens=6)
            answer = client.completions.create(model=path.name, prompt=PROMPT, max_tokens=6, temperature=0)
            assert answer.choices[0].text == expected.text
