"""Text that comes out piece by piece against the text that decoding all tokens at once gives."""

from collections.abc import Sequence
from typing import Any

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime.decoding.text import TextStream, text_after, token_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Ein größeres Beispiel: schöne Grüße aus Köln! 谢谢你 🙂🙂 family: 👨‍👩‍👧",
    "def main():\n    return [1, 2, 3]\n\n\n",
]
EMOJI = "🧑‍🚀🦜"


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "日本"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Gemma have it: a meta symbol for spaces, bytes for what has no token."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5 and newer conversions have it; here with bytes too."""
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT has it: no token holds a space, the decoder puts them in."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,:!�ö"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁", "d"), ("o", "g"), ("▁d", "og"), ("a", "▁")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


TOKENIZERS: dict[str, Tokenizer] = {
    make.__name__: make() for make in (byte_level, sentencepiece, metaspace, word_piece)
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def ids(name: str, *tokens: str) -> list[int]:
    """The ids of tokens that are in the vocabulary."""
    found = [TOKENIZERS[name].token_to_id(token) for token in tokens]
    assert None not in found
    return [token_id for token_id in found if token_id is not None]


def run(tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """All pieces, the flushed one last, and whether a stop string appeared."""
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token_id) for token_id in token_ids]
    return [*pieces, stream.flush()], stream.stopped


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string, letter by letter: the one that is whole first, the longest of those."""
    for end in range(1, len(text) + 1):
        if sizes := [len(string) for string in stop if text[:end].endswith(string)]:
            return text[: end - max(sizes)]
    return text


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Tokens as a bad model may give them: of texts, any others, special ones, some that do not exist."""
    tokenizer = TOKENIZERS[name]
    any_id = st.integers(0, tokenizer.get_vocab_size() + 3)
    chosen = [tokenizer.token_to_id(token) for token in ("<s>", "<|end|>", "▁", "<0x41>", "<0xFF>", "<0xF0>", "<0x20>")]
    odd_id = st.sampled_from([token_id for token_id in chosen if token_id is not None] or [0])
    words = st.sampled_from([*" ".join(CORPUS).split(), " ", "  ", "\n", EMOJI, "�", "é", "日本"])
    parts = st.one_of(words.map(lambda word: list(tokenizer.encode(word).ids)), st.lists(any_id), st.lists(odd_id))
    return st.lists(parts, max_size=8).map(lambda lists: [token_id for part in lists for token_id in part])


@every_tokenizer
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_whole_text(name: str, data: st.DataObject) -> None:
    token_ids = data.draw(ids_of(name))
    pieces, stopped = run(TOKENIZERS[name], token_ids)
    assert "".join(pieces) == TOKENIZERS[name].decode(token_ids)
    assert not stopped


@every_tokenizer
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_text_ends_before_the_first_stop_string(name: str, data: st.DataObject) -> None:
    token_ids = data.draw(ids_of(name))
    text = TOKENIZERS[name].decode(token_ids)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda span: text[span[0] : sum(span)])
    strings = st.one_of(spans, st.text("abtheog .", max_size=4), st.sampled_from([" ", "aab", "aa", "\n\n", "�"]))
    stop = data.draw(st.lists(strings.filter(bool), min_size=1, max_size=4))
    pieces, stopped = run(TOKENIZERS[name], token_ids, stop)
    assert "".join(pieces) == cut(text, stop)
    assert stopped == any(string in text for string in stop)


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_came_out_never_changes(name: str, data: st.DataObject) -> None:
    """Whatever comes next, the pieces so far are the start of the text."""
    token_ids, others = data.draw(ids_of(name)), data.draw(ids_of(name))
    so_far = "".join(run(TOKENIZERS[name], token_ids)[0][:-1])
    assert TOKENIZERS[name].decode(token_ids).startswith(so_far)
    assert TOKENIZERS[name].decode([*token_ids, *others]).startswith(so_far)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "metaspace"])
def test_text_that_was_encoded_comes_back(name: str) -> None:
    text = f"the dog{EMOJI} größe,  the\n\ndog"
    token_ids = TOKENIZERS[name].encode(text).ids
    pieces, _ = run(TOKENIZERS[name], token_ids)
    assert len(TOKENIZERS[name].encode(EMOJI).ids) > len(EMOJI)
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_an_emoji_comes_out_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = ids("byte_level", "Ġ", "ð", "Ł", "ĺ", "Ģ", "a")
    assert run(tokenizer, token_ids)[0] == [" ", "", "", "", "😀", "a", ""]


def test_an_emoji_of_byte_tokens_comes_out_with_what_follows() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    tokens = ("▁the", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<s>", "▁dog")
    assert run(tokenizer, ids("sentencepiece", *tokens))[0] == [
        "the", "", "", "", "", "", "😀 dog", ""
    ]  # fmt: skip


def test_words_come_out_as_they_come() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = ids("sentencepiece", "<s>", "▁the", "▁dog", "▁the")
    assert run(tokenizer, token_ids)[0] == ["", "the", " dog", " the", ""]


@pytest.mark.parametrize(
    ("name", "tokens", "rest"),
    [
        ("byte_level", ["a", "ð", "Ł"], "�"),
        ("sentencepiece", ["a", "<0xF0>", "<0x9F>"], "��"),
        ("sentencepiece", ["a", "<0x41>"], "A"),
        ("metaspace", ["a", "<0x41>", "<0xFF>"], "��"),
        ("byte_level", ["a", "<|end|>"], ""),
    ],
)
def test_what_is_not_whole_at_the_end_is_flushed_once(name: str, tokens: list[str], rest: str) -> None:
    tokenizer = TOKENIZERS[name]
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in ids(name, *tokens)] == ["a"] + [""] * (len(tokens) - 1)
    assert stream.flush() == rest
    assert stream.flush() == ""


def test_an_invalid_byte_takes_back_nothing() -> None:
    """DecodeStream by itself gives "A" away here and raises at the "b"."""
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = ids("sentencepiece", "a", "<0x41>", "<0xFF>", "b")
    assert run(tokenizer, token_ids)[0] == ["a", "", "", "��b", ""]


def letters(text: str) -> list[int]:
    """One byte-level token a letter."""
    return ids("byte_level", *text.replace(" ", "Ġ"))


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "stopped"),
    [
        ("abcd", ["bc"], ["a", "", "", "", ""], True),
        ("abd", ["bc"], ["a", "", "bd", ""], False),
        ("ab", ["bc"], ["a", "", "b"], False),
        ("aaab", ["aab"], ["", "", "a", "", ""], True),
        ("ababac", ["abac", "zz"], ["", "", "", "ab", "", "", ""], True),
        ("xabcd", ["b", "abcd"], ["x", "", "a", "", "", ""], True),
        ("xabcd", ["bc", "abc"], ["x", "", "", "", "", ""], True),
        ("a b", [" "], ["a", "", "", ""], True),
        ("stop", ["stop"], ["", "", "", "", ""], True),
    ],
)
def test_stop_strings_over_several_tokens(text: str, stop: list[str], pieces: list[str], stopped: bool) -> None:
    assert run(TOKENIZERS["byte_level"], letters(text), stop) == (pieces, stopped)


def test_a_stop_string_inside_one_token() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = ids("sentencepiece", "▁the", "▁dog", "▁the")
    assert run(tokenizer, token_ids, ["do"]) == (["the", " ", "", ""], True)
    assert run(tokenizer, token_ids, ["e d"]) == (["th", "", "", ""], True)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(TOKENIZERS["byte_level"], ["b"])
    assert [stream.push(token_id) for token_id in letters("ab")] == ["a", ""]
    assert stream.stopped
    assert [stream.push(token_id) for token_id in letters("cb")] == ["", ""]
    assert stream.flush() == ""


def test_the_start_of_a_stop_string_is_flushed_once() -> None:
    stream = TextStream(TOKENIZERS["byte_level"], ["bcd"])
    assert [stream.push(token_id) for token_id in letters("abc")] == ["a", "", ""]
    assert [stream.flush(), stream.flush()] == ["bc", ""]


def test_a_stop_string_can_appear_at_the_end() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    stream = TextStream(tokenizer, ["\n"])
    assert [stream.push(token_id) for token_id in ids("sentencepiece", "a", "<0x0A>")] == ["a", ""]
    assert not stream.stopped
    assert stream.flush() == ""
    assert stream.stopped


def test_streams_of_one_tokenizer_are_independent() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    one, other = TextStream(tokenizer), TextStream(tokenizer)
    first, *rest = letters("ðŁĺĢ")
    assert one.push(first) == other.push(first) == ""
    assert [one.push(token_id) for token_id in rest][-1] == "😀"
    assert other.flush() == "�"


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], r"^stop\[0\]: expected a string that is not empty, got ''$"),
        (["a", "", 3], r"^2 problems: \(1\) stop\[1\]: .*got ''; \(2\) stop\[2\]: .*got 3$"),
        ("END", r"^stop: expected a list of strings, got str 'END'$"),
        (None, r"^stop: expected a list of strings, got NoneType 'None'$"),
    ],
)
def test_a_wrong_stop_string_is_named(stop: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextStream(TOKENIZERS["byte_level"], stop)


def test_a_tokenizer_without_a_decoder_serves() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert run(tokenizer, [0, 1, 0])[0] == ["a", " b", " a", ""]


# After other text


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "metaspace", "word_piece"])
@pytest.mark.parametrize(("before", "after"), [("the dog", " the fox"), ("the dog,", "  lazy"), ("the", "dog")])
def test_a_text_and_what_follows_are_the_whole_text(name: str, before: str, after: str) -> None:
    if name == "word_piece":
        # Words alone: its decoder writes its own blanks.
        before, after = "the dog", " the fox"
    tokenizer = TOKENIZERS[name]
    before_ids = tokenizer.encode(before, add_special_tokens=False).ids
    whole_ids = tokenizer.encode(before + after, add_special_tokens=False).ids
    if whole_ids[: len(before_ids)] != before_ids:
        # Letter by letter it is the same text, without tokens across the border.
        assert after == "dog"
        after_ids = [ids(name, letter)[0] for letter in after]
    else:
        after_ids = whole_ids[len(before_ids) :]
    stream = TextStream(tokenizer, after_ids=before_ids)
    assert "".join([*map(stream.push, after_ids), stream.flush()]) == after
    assert text_after(tokenizer, before_ids, after_ids) == after


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_after_other_text_are_all_that_tokens_add(name: str, data: st.DataObject) -> None:
    before_ids, token_ids = data.draw(ids_of(name)), data.draw(ids_of(name))
    stream = TextStream(TOKENIZERS[name], after_ids=before_ids)
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join([*pieces, stream.flush()]) == text_after(TOKENIZERS[name], before_ids, token_ids)


def test_bytes_before_a_text_do_not_change_with_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    before_ids = ids("sentencepiece", "▁the", "<0x0A>")
    assert text_after(tokenizer, before_ids, ids("sentencepiece", "▁", "<0xFF>", "a")) == " �a"


def test_a_blank_after_a_special_token_is_the_tokenizers_own_where_it_writes_one() -> None:
    # Prepends a blank to each stretch between special tokens.
    own = TOKENIZERS["sentencepiece"]
    assert text_after(own, ids("sentencepiece", "<s>"), ids("sentencepiece", "▁the", "▁dog")) == "the dog"
    first_only = Tokenizer.from_str(TOKENIZERS["metaspace"].to_str())
    first_only.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    first_only.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    assert text_after(first_only, ids("metaspace", "<s>"), ids("metaspace", "▁the", "▁dog")) == " the dog"


@pytest.mark.parametrize(
    ("name", "token", "text"),
    [
        ("byte_level", "Ġ", " "),
        ("byte_level", "a", "a"),
        ("byte_level", "ð", "�"),
        ("byte_level", "<|end|>", "<|end|>"),
        ("sentencepiece", "▁the", " the"),
        ("sentencepiece", "he", "he"),
        ("sentencepiece", "▁", " "),
        ("sentencepiece", "▁▁", "  "),
        ("sentencepiece", "<0x0A>", "\n"),
        ("sentencepiece", "<0xFF>", "�"),
        ("sentencepiece", "<s>", "<s>"),
        ("metaspace", "▁the", " the"),
        ("metaspace", "he", "he"),
    ],
)
def test_a_tokens_own_text_keeps_its_blank(name: str, token: str, text: str) -> None:
    assert token_text(TOKENIZERS[name], ids(name, token)[0]) == text


# Special tokens


def test_special_tokens_are_shown_to_those_who_ask() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = ids("byte_level", "a", "<|end|>", "b")
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert [stream.push(token_id) for token_id in token_ids] == ["a", "<|end|>", "b"]
    assert run(tokenizer, token_ids)[0] == ["a", "", "b", ""]


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_tokens_name_stops_where_the_token_comes(skip: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["<|end|>", "bc"], skip_special_tokens=skip)
    # The "b" was held back: it might have begun the other one.
    assert [stream.push(token_id) for token_id in ids("byte_level", "a", "b", "<|end|>", "c")] == ["a", "", "b", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_special_tokens_name_in_letters_stops_too() -> None:
    assert run(TOKENIZERS["byte_level"], letters("a<|end|>b"), ["<|end|>"]) == (["a", *[""] * 9], True)
