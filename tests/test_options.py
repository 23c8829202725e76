"""The options of a generation: what is refused, and that every way to give them takes the same ones."""

import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from coreinfer import runtime
from coreinfer.bundles.shared.option_fields import option_of
from coreinfer.runtime.load_options import LoadKeywords, LoadOptions
from coreinfer.runtime.options import GenerationKeywords, GenerationOptions

from .engine_inputs import PROMPT, load


@pytest.fixture(scope="module")
def engine(tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return load(tiny_bundle("llama"))


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_option_that_there_is_not_is_refused(method: str, engine: runtime.Engine) -> None:
    with pytest.raises(TypeError, match="num_beams"):
        getattr(engine, method)(PROMPT, num_beams=4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"drift_tokens": -1}, "drift_tokens: expected a whole number of at least 0, got -1"),
        ({"drift_tokens": 1.5}, "drift_tokens: expected"),
        ({"logprobs": -1}, "logprobs: expected a whole number of at least 0, got -1"),
        ({"logprobs": True}, "logprobs: expected"),
        ({"max_new_tokens": 0, "logprobs": -2}, "2 problems"),
        ({"mode": "fast"}, "mode: expected auto"),
        ({"stop": "x"}, "stop: expected a list"),
        ({"logit_bias": {9999: 1}}, "logit_bias: expected ids from 0 to"),
        ({"logit_bias": {10**30: 1}}, "logit_bias: expected ids from 0 to"),
        ({"temperature": -1}, "temperature: expected"),
        ({"temperature": -1, "drift_tokens": -1, "stop": [""]}, "3 problems"),
        ({"parse_special": "no"}, "parse_special: expected True or False, got 'no'"),
        ({"continue_final_message": 1}, "continue_final_message: expected True or False, got 1"),
        ({"on_token": "print"}, "on_token: expected a function, got 'print'"),
        ({"cancel": True}, "cancel: expected an object with the method is_set, got True"),
    ],
)
def test_wrong_options_are_refused(options: Any, named: str, engine: runtime.Engine) -> None:
    makers: list[Callable[..., Any]] = [lambda **given: engine.stream(PROMPT, raw=True, **given)]
    if "logit_bias" not in options:
        # How many tokens there are only the engine knows.
        makers.append(GenerationOptions)
    for make in makers:
        with pytest.raises(runtime.ConfigError, match=named):
            make(**options)


@pytest.mark.parametrize(
    ("keywords", "options"), [(GenerationKeywords, GenerationOptions), (LoadKeywords, LoadOptions)]
)
def test_the_keywords_are_the_options(keywords: type, options: Any) -> None:
    assert get_type_hints(keywords) == {item.name: item.type for item in fields(options)}


@pytest.mark.parametrize("options", [GenerationOptions, LoadOptions])
def test_every_option_says_what_it_is_for(options: Any) -> None:
    for item in fields(options):
        assert len(option_of(item).help.split()) >= 3, item.name
        assert option_of(item).help.endswith("."), item.name


def test_a_prompt_that_leaves_too_little_room_is_refused_where_that_is_asked_for(engine: runtime.Engine) -> None:
    prompt = "word " * 60
    cut = engine.generate(prompt, raw=True, max_new_tokens=400)
    room = engine.manifest.model.max_positions - cut.num_prompt_tokens
    assert (
        engine.generate(prompt, raw=True, max_new_tokens=room, whole_length=True).num_prompt_tokens
        == cut.num_prompt_tokens
    )
    with pytest.raises(runtime.ContextTooLong, match=f"ask for at most {room} tokens"):
        engine.stream(prompt, raw=True, max_new_tokens=room + 1, whole_length=True)


def test_on_token_sees_every_token(engine: runtime.Engine) -> None:
    seen: list[runtime.Token] = []
    got = engine.generate(PROMPT, raw=True, max_new_tokens=6, on_token=seen.append)
    assert tuple(token.token_id for token in seen) == got.token_ids
    stream = engine.stream(PROMPT, raw=True, max_new_tokens=6, on_token=seen.append)
    assert [next(stream), next(stream)] == seen[6:]


def test_cancel_ends_a_generation_with_the_token_under_way(engine: runtime.Engine) -> None:
    whole = engine.generate(PROMPT, raw=True, max_new_tokens=20)
    cancel = threading.Event()

    def count(token: runtime.Token) -> None:
        if token.num_tokens == 4:
            cancel.set()

    got = engine.generate(PROMPT, raw=True, max_new_tokens=20, on_token=count, cancel=cancel)
    assert (got.token_ids, got.finish_reason) == (whole.token_ids[:5], "cancelled")
    assert got.text == engine.tokenizer.decode(list(got.token_ids))
    # What ends by itself is not cancelled.
    assert engine.generate(PROMPT, raw=True, max_new_tokens=1, cancel=cancel).finish_reason == "length"
    assert engine.generate(PROMPT, raw=True, max_new_tokens=20).token_ids == whole.token_ids
