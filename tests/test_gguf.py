"""Damaged GGUF files, files in parts, tokenizers, and the way through the command."""

import json
import logging
import os
import struct
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.compiler import cli
from coreinfer.compiler.cli import main
from coreinfer.compiler.models.gguf.header import read_header
from coreinfer.compiler.models.load import load_model, load_tokenizer, read_config, stop_ids
from coreinfer.compiler.models.sources import find_source

from .gguf_factory import Contents, contents, tiny_config, tiny_model, write
from .model_factory import build_tokenizer

Changed = Callable[..., Path]


@lru_cache(maxsize=1)
def _llama() -> Contents:
    return contents(tiny_model(tiny_config("llama")))


def llama() -> Contents:
    return deepcopy(_llama())


@pytest.fixture
def with_keys(tmp_path: Path) -> Changed:
    """Write a file whose header has other keys; None takes one away."""

    def change(**keys: Any) -> Path:
        what = llama()
        what.metadata |= {key.replace("__", "."): value for key, value in keys.items()}
        what.metadata = {key: value for key, value in what.metadata.items() if value is not None}
        return write(tmp_path / "model.gguf", what)[0]

    return change


def open_model(path: Path) -> None:
    source = find_source(str(path))
    family, config = read_config(source)
    load_model(source, family, config, device="cpu", dtype="float32")


def test_a_file_cut_short_anywhere_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf", llama())[0].read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 64, 5), *range(64, len(whole) - 32, len(whole) // 40), len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"^cut\.gguf: expected a .*GGUF file") as caught:
            open_model(cut)
        assert "\n" not in str(caught.value)


def test_damaged_headers_are_no_traceback(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "model.gguf", llama())[0].read_bytes())
    start = read_header(tmp_path / "model.gguf").tensors["token_embd.weight"].offset
    generator = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    for place in generator.integers(0, start, size=100):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        damaged.write_bytes(changed)
        # Any other error fails the test; a weight, a name or a number may change and be read as well.
        with suppress(CoreInferError):
            open_model(damaged)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF" + struct.pack("<I", 1), "got version 1; convert the model again"),
        (b"GGUF" + struct.pack("<I", 4), "got version 4; convert the model again"),
        (b"GGUF" + struct.pack(">I", 3), "got a big-endian file; convert the model again"),
        (b"PK\x03\x04" + b"\x00" * 4, r"expected a GGUF file, which starts with the bytes GGUF, got b'PK"),
        (b"ggml" + b"\x00" * 4, r"expected a GGUF file, which starts with the bytes GGUF, got b'ggml'"),
    ],
)
def test_files_of_another_format(start: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", llama())[0]
    path.write_bytes(start + path.read_bytes()[8:])
    with pytest.raises(ConfigError, match=message):
        open_model(path)


def test_types_that_cannot_be_unpacked_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", llama())[0]
    data = path.read_bytes()
    name = b"blk.0.attn_output.weight"
    # Behind the name: number of dimensions, two sizes, the type.
    place = data.index(name) + len(name) + 4 + 16
    for type_id, message in ((28, "is of type F64, which"), (16, "IQ2_XXS|no multiple of 256"), (99, "has type 99")):
        path.write_bytes(data[:place] + struct.pack("<I", type_id) + data[place + 4 :] + bytes(2**16))
        with pytest.raises(CoreInferError, match=message):
            open_model(path)


def test_a_model_in_parts_is_one_whichever_is_given(tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", llama(), parts=3)
    sources = [find_source(str(path)) for path in paths]
    assert {source.gguf_file for source in sources} == {"model-00001-of-00003.gguf"}
    assert len({source.sha256({}) for source in sources}) == 1
    before = sources[0].sha256({})
    paths[2].write_bytes(paths[2].read_bytes()[:-4] + b"\x00\x01\x02\x03")
    assert sources[0].sha256({}) != before


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(given: int, lost: int, tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", llama(), parts=3)
    paths[lost].unlink()
    message = "no such file" if lost == given else f"in 3 files, of which {paths[lost].name} is missing"
    with pytest.raises(ConfigError, match=message):
        open_model(paths[given])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", llama(), parts=2)
    for path in paths:
        os.rename(path, path.with_name(f"part{paths.index(path)}.gguf"))
        with pytest.raises(ConfigError, match=r"it says that it is one of 2 files \(split\.count\), its name says one"):
            open_model(path.with_name(f"part{paths.index(path)}.gguf"))


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", llama(), parts=3)
    os.rename(paths[1], tmp_path / "aside")
    os.rename(paths[2], paths[1])
    os.rename(tmp_path / "aside", paths[2])
    with pytest.raises(ConfigError, match=r"00002-of-00003\.gguf: by its name part 2, by what is in it part 3"):
        open_model(paths[0])


@pytest.mark.parametrize("difference", ["more tensors", "the same tensors twice", "metadata"])
def test_parts_of_different_models_are_refused(difference: str, tmp_path: Path) -> None:
    other = llama()
    if difference == "more tensors":
        other.tensors["blk.1.attn_q.bias"] = np.ones(32, dtype=np.float32)
    if difference == "the same tensors twice":
        names = list(other.tensors)
        other.tensors = {name: other.tensors[name] for name in [*names[1:], names[0]]}
    (tmp_path / "other").mkdir()
    paths, others = write(tmp_path / "m.gguf", llama(), parts=2), write(tmp_path / "other/m.gguf", other, parts=2)
    if difference == "metadata":
        # A first part of another model, with the second of ours copied over it.
        writer = gguf.GGUFWriter(others[1], "qwen2")
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(other.tensors))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    others[1].replace(paths[1])
    message = {
        "more tensors": "a part of another model than m-00001-of-00002.gguf; they differ in split.tensors.count",
        "the same tensors twice": r"m-00002-of-00002\.gguf: it repeats .* of m-00001-of-00002\.gguf",
        "metadata": "they differ in general.architecture",
    }[difference]
    with pytest.raises(ConfigError, match=message):
        open_model(paths[0])


def test_a_part_that_lost_tensors_is_refused(tmp_path: Path) -> None:
    what = llama()
    assert len(what.tensors) % 2
    paths = write(tmp_path / "m.gguf", what, parts=2)
    # The last is one of the first part.
    del what.tensors[list(what.tensors)[-1]]
    (tmp_path / "other").mkdir()
    data = write(tmp_path / "other/m.gguf", what, parts=2)[0].read_bytes()
    place = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    data = data[:place] + struct.pack("<i", len(llama().tensors)) + data[place + 4 :]
    paths[0].write_bytes(data)
    message = rf"expected {len(llama().tensors)} tensors in all parts \(split\.tensors\.count\), got"
    with pytest.raises(ConfigError, match=message):
        open_model(paths[0])


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        ({}, {2}),
        ({"tokenizer__ggml__eot_token_id": 7}, {2, 7}),
        ({"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": 8}, {2, 7, 8}),
        ({"tokenizer__ggml__eos_token_ids": [2, 9, 10]}, {2, 9, 10}),
        ({"tokenizer__ggml__eos_token_id": None, "tokenizer__ggml__eot_token_id": 7}, {7}),
    ],
    ids=str,
)
def test_every_token_that_ends_a_turn_is_a_stop(keys: dict[str, Any], stops: set[int], with_keys: Changed) -> None:
    source = find_source(str(with_keys(**keys)))
    family, config = read_config(source)
    assert stop_ids(load_model(source, family, config, device="cpu", dtype="float32")) == stops


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "eom", "padding"])
@pytest.mark.parametrize("token_id", [384, 2**32 - 1])
def test_token_ids_beyond_the_vocabulary_are_refused(key: str, token_id: int, with_keys: Changed) -> None:
    path = with_keys(**{f"tokenizer__ggml__{key}_token_id": token_id})
    with pytest.raises(ConfigError, match=rf"tokenizer\.ggml\.{key}_token_id: expected a token id below 384, got"):
        read_config(find_source(str(path)))


def tokenizer(path: Path) -> Any:
    return load_tokenizer(find_source(str(path)))


def test_the_tokenizer_is_that_of_the_model(with_keys: Changed) -> None:
    ours, theirs = tokenizer(with_keys()), build_tokenizer()
    text = "The soup of café 日本 12</s>  and\n\n more"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    assert ours.chat_template is None


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_a_text_begins_and_ends_as_stated(begins: bool, ends: bool, with_keys: Changed) -> None:
    path = with_keys(tokenizer__ggml__add_bos_token=begins, tokenizer__ggml__add_eos_token=ends)
    found = tokenizer(path)("soup").input_ids
    assert (found[0] == 1, found[-1] == 2) == (begins, ends)


@pytest.mark.parametrize(("pre", "begins"), [("gpt-2", False), ("qwen2", False), ("llama-bpe", True), ("tekken", True)])
def test_what_is_not_stated_of_the_beginning_is_the_kind_s(pre: str, begins: bool, with_keys: Changed) -> None:
    path = with_keys(tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=None)
    assert (tokenizer(path)("soup").input_ids[0] == 1) == begins


def test_a_beginning_without_its_token_is_refused(with_keys: Changed) -> None:
    path = with_keys(tokenizer__ggml__bos_token_id=None)
    with pytest.raises(ConfigError, match=r"bos_token_id: expected a token id, for each text is given"):
        tokenizer(path)


PIECES = {
    "gpt-2": ["Ġ", "Ġ2024", "Ġa", "'", "S"],
    "smollm": ["ĠĠ", "2", "0", "2", "4", "Ġa", "'", "S"],
    "llama-bpe": ["Ġ", "Ġ", "202", "4", "Ġa", "'S"],
    "qwen2": ["Ġ", "Ġ", "2", "0", "2", "4", "Ġa", "'S"],
    "tekken": ["Ġ", "Ġ", "2", "0", "2", "4", "Ġa", "'S"],
    "gpt-4o": ["Ġ", "Ġ", "202", "4", "Ġa'S"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_kind_of_model_does(pre: str, with_keys: Changed) -> None:
    backend = tokenizer(with_keys(tokenizer__ggml__pre=pre)).backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("  2024 a'S")] == PIECES[pre]
    assert json.loads(backend.to_str())["model"]["ignore_merges"] == (pre in ("llama-bpe", "tekken"))


def test_qwen_composes_what_it_reads(with_keys: Changed) -> None:
    composed, apart = "café", unicodedata.normalize("NFD", "café")
    for pre, alike in (("qwen2", True), ("llama-bpe", False)):
        found = tokenizer(with_keys(tokenizer__ggml__pre=pre))
        assert (found(composed).input_ids == found(apart).input_ids) == alike


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre": "default"}, r"pre = 'default' is not known; expected one of gpt-2, smollm"),
        ({"pre": "deepseek-v3"}, r"pre = 'deepseek-v3' is not known"),
        ({"pre": None}, r"pre: the file does not state how text is split; expected one of"),
        ({"model": "t5"}, r"model = 't5' is not supported; expected gpt2 or llama"),
        ({"model": None}, r"model = None is not supported"),
        ({"add_space_prefix": True}, r"add_space_prefix = True is not supported with gpt2"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces = True is not supported"),
        ({"precompiled_charsmap": [1, 2]}, r"precompiled_charsmap = \[1, 2\] is not supported"),
        ({"merges": None}, r"tokens: no tokenizer can be built of them \(KeyError: 'merges'\)"),
        ({"merges": ["zz qq"]}, r"tokenizer\.ggml\.(merges|tokens): "),
        ({"token_type": [1, 1]}, r"expected a type for each of 384 tokens, got 2"),
        ({"tokens": ["a"] * 384}, r"tokens: 383 tokens stand in it twice"),
    ],
    ids=str,
)
def test_tokenizers_that_would_give_other_tokens_are_refused(
    keys: dict[str, Any], message: str, with_keys: Changed
) -> None:
    path = with_keys(**{f"tokenizer__ggml__{key}": value for key, value in keys.items()})
    with pytest.raises(CoreInferError, match=message) as caught:
        tokenizer(path)
    assert "\n" not in str(caught.value)


def test_control_tokens_are_found_in_text_and_others_are_not(with_keys: Changed) -> None:
    tokens, kinds = (list(llama().metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type"))
    # In the place of the last two tokens, which no merge builds on.
    merges, free = llama().metadata["tokenizer.ggml.merges"][:-2], len(tokens) - 2
    # Letters outside of the byte alphabet, as DeepSeek's turns have them; and a word that its maker added.
    tokens[free], kinds[free] = "<｜User｜>", 3
    tokens[free + 1], kinds[free + 1] = "<think>", 4
    keys = {"tokens": tokens, "token_type": kinds, "merges": merges}
    found = tokenizer(with_keys(**{f"tokenizer__ggml__{key}": value for key, value in keys.items()}))
    assert found("<｜User｜><think>", add_special_tokens=False).input_ids == [free, free + 1]
    assert found.decode([free, free + 1], skip_special_tokens=True) == "<think>"


def test_templates_keep_their_names(with_keys: Changed) -> None:
    one = {"tokenizer__chat_template": "a"}
    several = {**one, "tokenizer__chat_template__tool_use": "b", "tokenizer__chat_templates": ["tool_use"]}
    assert tokenizer(with_keys(**one)).chat_template == "a"
    assert tokenizer(with_keys(**several)).chat_template == {"default": "a", "tool_use": "b"}


def pieces(**keys: Any) -> dict[str, Any]:
    """A tiny SentencePiece vocabulary with scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "s", "o", "u", "p", "so", "up"]
    tokens += ["soup", "▁soup", "▁▁"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    stated = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [-float(index) for index in range(len(tokens))],
        "token_type": kinds,
        "merges": None,
        "unknown_token_id": 0,
        "padding_token_id": None,
        **keys,
    }
    return {f"tokenizer__ggml__{key}": value for key, value in stated.items()}


@pytest.mark.parametrize(
    ("spaced", "expected"), [(None, ["<s>", "▁soup"]), (True, ["<s>", "▁soup"]), (False, ["<s>", "soup"])]
)
def test_sentence_pieces_have_the_space_that_is_stated(
    spaced: bool | None, expected: list[str], with_keys: Changed
) -> None:
    found = tokenizer(with_keys(**pieces(add_space_prefix=spaced, add_bos_token=None)))
    ids = found("soup").input_ids
    assert found.convert_ids_to_tokens(ids) == expected
    assert found.decode(ids, skip_special_tokens=True) == "soup"
    assert found.decode(found("soup é").input_ids, skip_special_tokens=True) == "soup é"


def test_sentence_pieces_without_scores_are_refused(with_keys: Changed) -> None:
    with pytest.raises(ConfigError, match=r"expected a score for each of \d+ tokens"):
        tokenizer(with_keys(**pieces(scores=None)))


@pytest.fixture
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "start_logging", lambda *, verbose: logging.getLogger("coreinfer"))
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@pytest.mark.usefixtures("_own_cache")
def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    what = llama()
    del what.tensors["blk.1.ffn_down.weight"]
    path = write(tmp_path / "model.gguf", what)[0]
    for spoil, message in (
        (lambda: None, "missing blk.1.ffn_down.weight"),
        (lambda: path.write_bytes(path.read_bytes()[:5000]), "expected a whole GGUF file"),
    ):
        spoil()
        result = CliRunner().invoke(main, ["--model", str(path), "-o", str(tmp_path / "bundle")])
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "bundle").exists()
