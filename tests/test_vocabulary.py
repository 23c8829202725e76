"""Tokenizers with more tokens than the embedding has rows."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models.vocabulary import fit_tokenizer
from transformers import AutoTokenizer

from .model_factory import VOCABULARY, build_tokenizer, corpus_texts

TEXTS = ["A <|image|> of zorg soup", *corpus_texts()[:4]]


def with_tokens(**special: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"], **special})
    tokenizer.add_tokens(["zorg"])
    return tokenizer


def ids_of(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.backend_tokenizer.encode(text).ids for text in TEXTS]


def test_added_tokens_become_text_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_tokens()
    assert max(max(ids) for ids in ids_of(tokenizer)) >= VOCABULARY
    fit_tokenizer(tokenizer, VOCABULARY, "tiny")
    assert ids_of(tokenizer) == ids_of(build_tokenizer())
    assert tokenizer.backend_tokenizer.decode(ids_of(tokenizer)[0]) == TEXTS[0]
    assert "--model tiny: '<|image|>', 'zorg' left out of the tokenizer" in caplog.text


def test_those_that_have_a_row_stay() -> None:
    tokenizer, expected = with_tokens(), ids_of(with_tokens())
    fit_tokenizer(tokenizer, VOCABULARY + 2, "tiny")
    assert ids_of(tokenizer) == expected
    fit_tokenizer(tokenizer, VOCABULARY + 1, "tiny")
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<|image|>", "zorg")] == [VOCABULARY, None]


def test_a_padding_token_is_no_loss() -> None:
    tokenizer = with_tokens(pad_token="[PAD]")
    fit_tokenizer(tokenizer, VOCABULARY, "tiny")
    assert tokenizer.pad_token_id is None


def test_tokens_are_left_out_of_the_models_own_list_too(tmp_path: Path) -> None:
    with_tokens().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"] |= {"<|image|>": VOCABULARY, "zorg": VOCABULARY + 1}
    path.write_text(json.dumps(data), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    fit_tokenizer(tokenizer, VOCABULARY, "tiny")
    assert ids_of(tokenizer) == ids_of(build_tokenizer())


def ends_beyond() -> Any:
    return with_tokens(eos_token="<|end|>")


def surrounds_beyond() -> Any:
    tokenizer = with_tokens()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    start = {"id": "<|image|>", "ids": [VOCABULARY], "tokens": ["<|image|>"]}
    data["post_processor"]["special_tokens"]["<|image|>"] = start
    data["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|image|>", "type_id": 0}})
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(data))
    return tokenizer


@pytest.mark.parametrize(("make", "num_rows"), [(build_tokenizer, 300), (ends_beyond, 384), (surrounds_beyond, 384)])
def test_tokens_that_texts_need_are_refused(make: Callable[[], Any], num_rows: int) -> None:
    with pytest.raises(ConfigError) as caught:
        fit_tokenizer(make(), num_rows, "tiny")
    assert f"beyond the {num_rows} rows of its embedding; give the tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def inputs(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> Iterator[CompileConfig]:
    """The options of a compile of a model with more tokens than rows; the model's folder is put back."""
    given = tiny_inputs("llama")
    with_tokens().save_pretrained(given.model)
    yield replace(given, output=tmp_path / "bundle", keep=1.0, evaluate=False)
    build_tokenizer().save_pretrained(given.model)


def test_a_bundle_holds_only_tokens_that_have_a_row(inputs: CompileConfig) -> None:
    compile_model(inputs)
    engine = runtime.load(inputs.output, engine="native", threads=1)
    assert max(engine.tokenizer.get_vocab(with_added_tokens=True).values()) == VOCABULARY - 1
    assert len(engine.generate(TEXTS[0], max_new_tokens=3).token_ids) > 0
