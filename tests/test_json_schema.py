"""Answers that follow a JSON schema: what a random model writes is valid whatever it would rather say."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.runtime.decoding.grammar import JsonGrammars

from .engine_inputs import PROMPT

SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"dish": {"enum": ["soup", "cake"]}, "minutes": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["dish", "minutes"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "string": {"type": "string", "pattern": "^[a-f]{3,5}$"},
    "either": {"anyOf": [{"type": "null"}, {"const": 7}, {"enum": ["tide"]}]},
}


def valid(name: str, value: Any) -> bool:
    """The schemas above, by hand."""
    if name == "object":
        return (
            value.keys() == {"dish", "minutes"} and value["dish"] in ("soup", "cake") and value["minutes"] in range(100)
        )
    if name == "array":
        return len(value) in (2, 3) and all(item in (True, False) for item in value)
    if name == "string":
        return 3 <= len(value) <= 5 and set(value) <= set("abcdef")
    return value in (None, 7, "tide")


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return runtime.load(tiny_bundle("llama", quantize="int8"), engine=request.param, threads=1)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_a_random_model_says_is_valid(name: str, temperature: float, engine: runtime.Engine) -> None:
    texts = set()
    for seed in range(4):
        got = engine.generate(
            PROMPT,
            raw=True,
            json_schema=SCHEMAS[name],
            temperature=temperature,
            seed=seed,
            max_new_tokens=100,
            top_k=50,
        )
        assert got.finish_reason == "stop"
        assert got.token_ids[-1] in engine.eos_token_ids
        assert valid(name, json.loads(got.text)), got.text
        texts.add(got.text)
    assert len(texts) == 1 if temperature == 0 else len(texts) > 1


def test_a_schema_may_be_text_and_goes_with_other_options(engine: runtime.Engine) -> None:
    schema = json.dumps(SCHEMAS["object"])
    got = engine.generate(PROMPT, raw=True, json_schema=schema, max_new_tokens=100, repetition_penalty=1.3, logprobs=2)
    assert valid("object", json.loads(got.text))
    # Log-probabilities are the model's own, which would rather have said something else.
    assert any(top[0].logprob > own for own, top in zip(got.logprobs, got.top_logprobs, strict=True))


def test_true_is_any_json(engine: runtime.Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "logit_bias": {engine.tokenizer.token_to_id("7"): 100}}
    schemas: tuple[str | dict[str, Any], ...] = ("true", {})
    got = [engine.generate(PROMPT, json_schema=schema, **options) for schema in schemas]
    assert got[0].token_ids == got[1].token_ids
    assert got[0].text.strip("7") == ""


def test_without_a_schema_the_model_says_something_else(engine: runtime.Engine) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(engine.generate(PROMPT, raw=True, max_new_tokens=100).text)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ("{", "json_schema: expected JSON"),
        ("7", "json_schema: expected an object or true, got 7"),
        ("false", "json_schema: expected an object or true, got false"),
        (7, "json_schema: expected a schema or its text, got int"),
        ({"type": "soup"}, "json_schema: "),
        ({"type": "string", "pattern": "("}, "json_schema: "),
        ({"$ref": "#/nowhere"}, "json_schema: "),
        ({"enum": [object()]}, "json_schema: expected JSON"),
    ],
)
def test_a_wrong_schema_is_refused_at_the_call(schema: Any, named: str, engine: runtime.Engine) -> None:
    with pytest.raises(runtime.ConfigError, match=named) as caught:
        engine.stream(PROMPT, raw=True, json_schema=schema)
    assert "\n" not in str(caught.value)
    assert engine.generate(PROMPT, raw=True, max_new_tokens=1).text is not None


def test_without_the_package_the_error_says_what_to_install(
    engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    # A server starts without it.
    engine.loaded.grammars.prepare()
    with pytest.raises(runtime.ConfigError, match=r"pip install 'coreinfer\[json\]'"):
        engine.stream(PROMPT, raw=True, json_schema=SCHEMAS["array"])


def test_a_mask_leaves_the_logits_alone(engine: runtime.Engine) -> None:
    # Some models have more logits than their tokenizer has tokens.
    size = engine.manifest.model.vocab_size + 13
    grammars = JsonGrammars(engine.tokenizer, vocab_size=size, eos_token_ids=engine.eos_token_ids)
    grammar = grammars.grammar(SCHEMAS["either"])
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32)
    before = logits.copy()
    masked = grammar.masked(logits)
    np.testing.assert_array_equal(logits, before)
    allowed = np.flatnonzero(np.isfinite(masked))
    starts = {engine.tokenizer.decode([token_id])[:1] for token_id in allowed.tolist()}
    assert starts == {"n", "7", '"'}
    np.testing.assert_array_equal(masked[allowed], logits[allowed])
    assert not np.isfinite(masked[sorted(engine.eos_token_ids)]).any()


@pytest.mark.parametrize("name", SCHEMAS)
def test_tokens_without_a_logit_are_never_chosen(name: str, engine: runtime.Engine) -> None:
    size = engine.manifest.model.vocab_size - 1
    assert size < engine.tokenizer.get_vocab_size()
    grammar = JsonGrammars(engine.tokenizer, vocab_size=size, eos_token_ids=engine.eos_token_ids).grammar(SCHEMAS[name])
    random, ids = np.random.default_rng(0), [0]
    while ids[-1] not in engine.eos_token_ids:
        masked = grammar.masked(random.normal(size=size).astype(np.float32))
        assert masked.shape == (size,)
        ids.append(int(masked.argmax()))
        grammar.advance(ids[-1])
    assert valid(name, json.loads(engine.tokenizer.decode(ids)))


def test_where_every_way_on_lacks_a_logit_it_is_said(engine: runtime.Engine) -> None:
    grammars = JsonGrammars(engine.tokenizer, vocab_size=20, eos_token_ids=engine.eos_token_ids)
    with pytest.raises(runtime.CoreInferError, match="tokens that the model has no logit for"):
        grammars.grammar(SCHEMAS["object"]).masked(np.zeros(20, dtype=np.float32))


def test_a_bundle_with_more_tokens_than_embeddings(engine: runtime.Engine) -> None:
    """As earlier compilers wrote it: schemas work, and a prompt with such a token is refused by name."""
    engine.tokenizer.add_special_tokens(["<|image|>"])
    got = engine.generate(PROMPT, json_schema=SCHEMAS["object"], max_new_tokens=100)
    assert valid("object", json.loads(got.text))
    with pytest.raises(runtime.ConfigError, match=r"no embedding for the token '<\|image\|>'; leave it out"):
        engine.generate("Look: <|image|>", max_new_tokens=1)


def test_a_tokenizer_that_llguidance_does_not_read(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llguidance.LLTokenizer", lambda *_, **__: int("no number"))
    engine.loaded.grammars.prepare()
    with pytest.raises(runtime.ConfigError, match="llguidance does not read this tokenizer"):
        engine.stream(PROMPT, json_schema=SCHEMAS["array"])
