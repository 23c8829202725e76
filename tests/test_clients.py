"""The server asked by clients that people use: each a chat, a stream, and a call of a function.

A client that is not installed fails its tests: they are in the extra `dev`.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from coreinfer import runtime
from pydantic import BaseModel, ConfigDict, SecretStr

from .engine_inputs import PROMPT
from .server_process import RunningServer, serving

NUM_TOKENS = 8
CALL_TOKENS = 100
ASK = [{"role": "user", "content": PROMPT}]


class Weather(BaseModel):
    """Tell the weather of a city."""

    # A random model that may add keys goes on adding them.
    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "Weather",
        "description": "Tell the weather of a city.",
        "parameters": Weather.model_json_schema(),
    },
}


@pytest.fixture(scope="module")
def server(long_bundle: Path) -> Iterator[RunningServer]:
    with serving(long_bundle, key="sesame") as running:
        yield running


@pytest.fixture(scope="module")
def name(long_bundle: Path) -> str:
    return long_bundle.name


@pytest.fixture(scope="module")
def text(long_bundle: Path) -> str:
    """What every client should get."""
    engine = runtime.load(long_bundle, engine="native", threads=1)
    return engine.generate(ASK, max_new_tokens=NUM_TOKENS).text


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked but the server."""
    for variable, value in (
        ("LITELLM_LOCAL_MODEL_COST_MAP", "True"),
        ("LANGCHAIN_TRACING_V2", "false"),
        ("LANGSMITH_TRACING", "false"),
        ("LLAMA_INDEX_DISABLE_TELEMETRY", "true"),
    ):
        monkeypatch.setenv(variable, value)


# openai


def test_openai(server: RunningServer, name: str, text: str) -> None:
    with server.client() as client:
        options: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": NUM_TOKENS}
        messages: list[Any] = [*ASK]
        answer = client.chat.completions.create(messages=messages, **options).choices[0].message
        assert answer.content == text
        chunks = client.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        messages += [answer, {"role": "user", "content": "And then?"}]
        assert client.chat.completions.create(messages=messages, **options).choices[0].message.content
        parsed = client.chat.completions.parse(
            model=name, messages=messages, response_format=Weather, max_tokens=CALL_TOKENS, seed=1
        )
        assert isinstance(parsed.choices[0].message.parsed, Weather)


def test_openai_calls_in_a_loop(server: RunningServer, name: str) -> None:
    with server.client() as client:
        messages: list[Any] = [*ASK]
        for seed in range(3):
            answer: Any = client.chat.completions.create(
                model=name, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=CALL_TOKENS, seed=seed
            )
            message = answer.choices[0].message
            messages.append(message)
            for call in message.tool_calls:
                Weather.model_validate_json(call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
        with client.chat.completions.stream(
            model=name, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=CALL_TOKENS
        ) as stream:
            final: Any = stream.get_final_completion()
        Weather.model_validate_json(final.choices[0].message.tool_calls[0].function.arguments)


# langchain-openai


@pytest.fixture
def langchain(server: RunningServer, name: str) -> Any:
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_TOKENS, "max_retries": 0}
    return ChatOpenAI(model=name, base_url=f"{server.url}/v1", api_key=SecretStr(server.key), **options)


def test_langchain(langchain: Any, text: str) -> None:
    assert langchain.invoke(PROMPT).content == text
    assert "".join(chunk.content for chunk in langchain.stream(PROMPT)) == text
    first = langchain.invoke(PROMPT)
    assert langchain.invoke([("user", PROMPT), first, ("user", "And then?")]).usage_metadata["input_tokens"] > 20


def test_langchain_calls(langchain: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    long = langchain.model_copy(update={"max_tokens": CALL_TOKENS})
    bound = long.bind_tools([Weather], tool_choice="Weather")
    said = bound.invoke(PROMPT)
    (call,) = said.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    result = ToolMessage("rain", tool_call_id=call["id"])
    assert long.invoke([HumanMessage(PROMPT), said, result]).content
    chunks = list(bound.stream(PROMPT))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls[0]["args"] == call["args"]
    for method in ("json_schema", "function_calling"):
        assert isinstance(long.with_structured_output(Weather, method=method).invoke(PROMPT), Weather)


# llama-index


@pytest.fixture
def llama_index(server: RunningServer, name: str) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=name,
        api_base=f"{server.url}/v1",
        api_key=server.key,
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=2048,
        temperature=0,
        max_tokens=NUM_TOKENS,
        max_retries=0,
    )


def test_llama_index(llama_index: Any, text: str) -> None:
    from llama_index.core.llms import ChatMessage

    messages = [ChatMessage(role="user", content=PROMPT)]
    answer = llama_index.chat(messages)
    assert answer.message.content == text
    assert "".join(chunk.delta for chunk in llama_index.stream_chat(messages)) == text
    assert llama_index.chat([*messages, answer.message, ChatMessage(role="user", content="And?")]).message.content
    assert llama_index.complete(PROMPT).text == text


def test_llama_index_calls(llama_index: Any) -> None:
    from llama_index.core.tools import FunctionTool

    def weather(city: str, days: int) -> str:
        return f"{city}: {days} of rain"

    tool = FunctionTool.from_defaults(weather, name="Weather", description="Tell it.", fn_schema=Weather)
    llm = llama_index.model_copy(update={"max_tokens": CALL_TOKENS})
    answer = llm.chat_with_tools([tool], user_msg=PROMPT, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "Weather"
    Weather.model_validate(call.tool_kwargs)
    streamed = list(llm.stream_chat_with_tools([tool], user_msg=PROMPT, tool_required=True))[-1]
    (again,) = llm.get_tool_calls_from_response(streamed)
    assert again.tool_kwargs == call.tool_kwargs


# litellm


@pytest.fixture
def loop_of_thread() -> Iterator[None]:
    """The event loop that litellm's blocking calls would otherwise make for this thread, and leave open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def litellm_options(server: RunningServer, name: str, loop_of_thread: None) -> dict[str, Any]:
    return {
        "model": f"openai/{name}",
        "api_base": f"{server.url}/v1",
        "api_key": server.key,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "num_retries": 0,
    }


def test_litellm(litellm_options: dict[str, Any], text: str) -> None:
    import litellm

    answer: Any = litellm.completion(messages=ASK, **litellm_options)
    assert answer.choices[0].message.content == text
    chunks: Any = litellm.completion(messages=ASK, stream=True, **litellm_options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    turns = [*ASK, answer.choices[0].message, {"role": "user", "content": "And then?"}]
    second: Any = litellm.completion(messages=turns, **litellm_options)
    assert second.choices[0].message.content
    completion: Any = litellm.text_completion(prompt=PROMPT, **{**litellm_options, "model": _text(litellm_options)})
    assert completion.choices[0].text


def _text(options: dict[str, Any]) -> str:
    """litellm's name for the route of completions."""
    return f"text-completion-{options['model']}"


def test_litellm_calls(litellm_options: dict[str, Any]) -> None:
    import litellm

    options = {**litellm_options, "tools": [TOOL], "tool_choice": "required", "max_tokens": CALL_TOKENS}
    answer: Any = litellm.completion(messages=ASK, **options)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    Weather.model_validate_json(message.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    after: Any = litellm.completion(messages=[*ASK, message, result], **options)
    assert after.choices[0].message.tool_calls
    chunks: Any = list(litellm.completion(messages=ASK, stream=True, **options))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(call.function.arguments for call in calls) == message.tool_calls[0].function.arguments


# instructor


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(server: RunningServer, name: str, mode: str) -> None:
    import instructor

    with server.client() as client:
        patched: Any = instructor.from_openai(client, mode=instructor.Mode[mode])
        options: dict[str, Any] = {
            "model": name,
            "messages": [*ASK],
            "response_model": Weather,
            "max_tokens": CALL_TOKENS,
            "max_retries": 0,
            "seed": 2,
        }
        whole = patched.chat.completions.create(**options)
        assert isinstance(whole, Weather)
        # Its schema is another one: of a model whose fields may be missing.
        *_, last = patched.chat.completions.create_partial(**options)
        assert last.model_dump().keys() == {"city", "days"}
