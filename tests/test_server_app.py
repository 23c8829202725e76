"""The server's routes, asked by OpenAI's own client and by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from coreinfer import runtime

from .engine_inputs import DIALOGUE, PROMPT
from .model_factory import corpus_texts
from .server_process import RunningServer, serving, user

OTHER = "The law text number 7 speaks of court and judge and verdict."
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 12}


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
