"""From the body of a request to the options of a generation."""

from typing import Any

import pytest
from coreinfer.bundles.shared.option_fields import help_of
from coreinfer.runtime import GenerationOptions
from coreinfer.server.requests.generation_options import chat_options, completion_options, same_names
from coreinfer.server.requests.request_bodies import ChatRequest, CompletionRequest
from coreinfer.server.server_config import ServerConfig

SAMPLING = {
    "temperature": 0.0,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "presence_penalty": -1.0,
    "frequency_penalty": 2.0,
    "seed": 3,
    "mode": "dense",
    "token_share": 1.0,
    "prompt_ffn": "pack",
    "skip_special_tokens": False,
}
CHAT = {"chat_template_kwargs": {"a": 1}, "continue_final_message": False, "parse_special": True}
MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(**given: Any) -> GenerationOptions:
    body = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, **given})
    return chat_options(body, ServerConfig(max_new_tokens=99))


def completion(**given: Any) -> GenerationOptions:
    return completion_options(CompletionRequest(model="m", prompt="Hello", **given), ServerConfig(max_new_tokens=99))


def test_what_has_one_name_is_taken_as_it_is() -> None:
    # A field that joins a body under the name of an option has to mean the same, and to be added here.
    assert same_names(ChatRequest) == {*SAMPLING, *CHAT}
    assert same_names(CompletionRequest) == set(SAMPLING)
    expected = GenerationOptions(**SAMPLING, **CHAT, max_new_tokens=99)  # type: ignore[arg-type]
    assert chat(**SAMPLING, **CHAT) == expected
    assert completion(**SAMPLING) == GenerationOptions(**SAMPLING, max_new_tokens=16, raw=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{}, dict.fromkeys([*SAMPLING, *CHAT, "stop", "logit_bias", "tools"])])
def test_what_is_left_out_or_null_has_its_default(given: dict[str, None]) -> None:
    assert chat(**given) == GenerationOptions(temperature=1.0, max_new_tokens=99)


def test_what_is_of_another_kind_is_translated() -> None:
    got = chat(logit_bias={"5": 1}, stop="x", logprobs=True, top_logprobs=2, max_tokens=4)
    assert got == GenerationOptions(
        temperature=1.0, logit_bias={5: 1}, stop=["x"], logprobs=2, max_new_tokens=4, whole_length=True
    )


@pytest.mark.parametrize("name", ["mode", "top_k", "min_p", "repetition_penalty", "parse_special"])
def test_fields_of_ours_describe_themselves_as_the_options_do(name: str) -> None:
    said = ChatRequest.model_json_schema()["properties"][name]["description"]
    assert said == f"{help_of(GenerationOptions, name)} Not in OpenAI's interface."
