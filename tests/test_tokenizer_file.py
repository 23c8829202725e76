"""The tokenizer's file in a bundle: small and quick to read, and still the same tokenizer."""

import json

import pytest
from coreinfer.compiler.quantize.pack import quick_to_read
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

TEXT = "the lower tower, towed the lot"


def bpe(merges: list[tuple[str, str]]) -> Tokenizer:
    letters = sorted({letter for letter in TEXT if letter != " "} | {"Ġ", " "})
    tokens = [*letters, *dict.fromkeys("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end of text>")])
    return tokenizer


@pytest.mark.parametrize(
    ("merges", "kind"),
    [([("t", "h"), ("th", "e"), ("o", "w"), ("Ġ", "t")], str), ([("t", "h"), ("e", " "), ("o", "w")], list)],
)
def test_merges_are_written_the_quick_way_unless_a_token_has_a_space(merges: list[tuple[str, str]], kind: type) -> None:
    tokenizer = bpe(merges)
    written = quick_to_read(tokenizer.to_str())
    assert {type(merge) for merge in json.loads(written)["model"]["merges"]} == {kind}
    again = Tokenizer.from_str(written)
    assert json.loads(again.to_str()) == json.loads(tokenizer.to_str())
    assert again.encode(TEXT + "<end of text>").ids == tokenizer.encode(TEXT + "<end of text>").ids


def test_limits_are_left_out_and_models_without_merges_stay() -> None:
    tokenizer = Tokenizer(WordLevel({"the": 0, "lot": 1}, unk_token="the"))
    expected = json.loads(tokenizer.to_str())
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=9)
    written = quick_to_read(tokenizer.to_str())
    assert json.loads(written) == expected
    # Compact: no blanks but those of tokens.
    assert '", "' not in written
