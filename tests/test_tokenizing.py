"""What is stored of a tokenizer: its own file, its chat templates, and texts that begin once."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models.load import load_tokenizer
from coreinfer.compiler.models.sources import find_source
from coreinfer.compiler.models.tokenizer_files import chat_templates
from coreinfer.compiler.text.builtin import Seed, _prompt_ids
from coreinfer.compiler.text.corpus import split_into_documents
from tokenizers import Tokenizer, pre_tokenizers, processors

from .model_factory import CHAT_TEMPLATE, build_tokenizer, corpus_texts, save_model

TOOL_TEMPLATE = "{{ tools | tojson }}" + CHAT_TEMPLATE
TEXT = corpus_texts()[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer's folder."""
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> Any:
    return load_tokenizer(find_source(str(folder)))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


# The file


def split_at_vowels(folder: Path) -> Tokenizer:
    """Give a folder's tokenizer.json another pre-tokenizer than any class of transformers has."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vowels = pre_tokenizers.Split(tokenizers.Regex("[aeiou]"), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence([vowels, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    own.save(str(folder / "tokenizer.json"))
    return own


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_the_file_counts_and_not_what_a_class_makes_of_it(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = split_at_vowels(folder)
    change_config(folder, tokenizer_class=name, backend=None)
    got = load(folder)
    assert got.backend_tokenizer.encode(TEXT).ids == own.encode(TEXT).ids
    # The class would also have added tokens that the model does not know.
    assert got.backend_tokenizer.get_vocab_size() == own.get_vocab_size()
    assert got.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert got.chat_template == CHAT_TEMPLATE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = f"tokenizer.json splits text otherwise than transformers' {name}: in \"The quick brown fox doesn't"
    assert said in record.getMessage()
    assert "comes T h e Ġ q u, not The Ġ" in record.getMessage()


def test_of_the_same_nothing_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(folder).backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()
    assert not caplog.records


def test_tokens_that_only_the_config_has_are_added(folder: Path) -> None:
    fields = {"content": "<tool>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    split_at_vowels(folder)
    change_config(
        folder,
        tokenizer_class="Qwen2Tokenizer",
        backend=None,
        added_tokens_decoder={"384": {**fields, "single_word": False}},
    )
    assert load(folder).backend_tokenizer.encode("a<tool>b").ids[-2] == 384


def test_a_file_that_cannot_be_read_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--model .*: its tokenizer"):
        load(folder)


# Templates


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def with_templates(folder: Path, templates: list[dict[str, str]]) -> Path:
    (folder / "chat_template.jinja").unlink()
    change_config(folder, chat_template=templates)
    return folder


def test_named_templates_reach_the_bundle(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_templates(
        save_model(tmp_path / "model", "llama"), named(default=CHAT_TEMPLATE, tool_use=TOOL_TEMPLATE)
    )
    target = tmp_path / "bundle"
    compile_model(replace(tiny_inputs("llama"), model=str(model), output=target, evaluate=False, keep=0.5, clusters=2))
    bundle = open_bundle(target)
    assert bundle.read_bytes(LAYOUT.chat_template).decode() == CHAT_TEMPLATE
    assert bundle.read_bytes(LAYOUT.tool_template).decode() == TOOL_TEMPLATE
    prompts = runtime.load(target, engine="native", threads=1).loaded.prompts
    options = runtime.GenerationOptions(tools=[{"name": "tide"}])
    messages = [{"role": "user", "content": "soup"}]
    assert prompts.render(messages) == "<|user|>soup</s><|assistant|>"
    assert prompts.render(messages, options) == '[{"name": "tide"}]<|user|>soup</s><|assistant|>'
    assert "chat templates" not in caplog.text


def test_templates_in_files_of_their_own(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE, encoding="utf-8")
    assert chat_templates(load(folder)) == {"default": CHAT_TEMPLATE, "tool_use": TOOL_TEMPLATE}


def test_the_only_template_is_the_default_whatever_its_name(folder: Path) -> None:
    assert chat_templates(load(with_templates(folder, named(rag="A")))) == {"default": "A"}


def test_several_templates_without_a_default_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="chat templates: expected one called default, got rag, tool_use"):
        load(with_templates(folder, named(tool_use="A", rag="B")))


def test_templates_that_are_left_out_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    got = chat_templates(load(with_templates(folder, named(default="A", rag="B"))))
    assert got == {"default": "A"}
    assert "chat templates left out: rag; kept: default" in caplog.text


def test_no_template_is_none() -> None:
    assert chat_templates(SimpleNamespace(chat_template=None)) == {}


# Calibration text


@pytest.fixture
def ending() -> Any:
    """A tokenizer that puts EOS at the end of a text."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_calibration_text_begins_once_and_has_no_end(ending: Any) -> None:
    (plain,) = split_into_documents([TEXT], ending.backend_tokenizer, 200)
    assert plain.token_ids[0] == 1
    assert plain.text == TEXT
    assert not {1, 2} & {*plain.token_ids[1:]}
    (written,) = split_into_documents([f"<s>{TEXT}"], ending.backend_tokenizer, 200)
    assert written.token_ids == plain.token_ids


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}{{ messages[0].content }}", None, {"rag": "{{ messages[0].content }}"}]
)
def test_seed_prompts_can_be_continued(template: Any, ending: Any) -> None:
    ending.chat_template = template
    for kind in ("chat", "text"):
        token_ids = _prompt_ids(Seed(topic="sea", kind=kind, prompt="ship"), ending, 9)
        assert token_ids[-1] != 2
        assert token_ids.count(1) == (0 if isinstance(template, dict) and kind == "chat" else 1)
