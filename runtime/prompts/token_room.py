"""How many characters a token can stand for: what is certainly too long need not be tokenized to know it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

__all__ = ["TokenRoom", "token_room"]

_NFC_SHRINKS = 4
"""Characters of which NFC makes one at most, as of U+1F82 (Unicode Standard Annex 15, section 13)."""


@dataclass(frozen=True, kw_only=True)
class TokenRoom:
    """What tokens can hold.

    Attributes:
        most_characters: of a text that one token can stand for.
        lost: characters that are dropped, because the vocabulary lacks them.
    """

    most_characters: int
    lost: str

    def least_tokens(self, text: str) -> int:
        """Return a lower bound of the number of tokens of a text."""
        return -(-(len(text) - sum(map(text.count, self.lost))) // self.most_characters)


def token_room(tokenizer: Tokenizer) -> TokenRoom | None:
    """Find out how many characters tokens can hold; None where there is no telling.

    It is known where no part of the tokenizer drops characters or makes one token of any number of them: of byte-level
    BPE and BPE with byte fallback, after the usual normalizers.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lost = _lost(tokenizer, vocabulary)
    pre_parts, normalizers = list(_parts(tokenizer.pre_tokenizer)), list(_parts(tokenizer.normalizer))
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        type(tokenizer.model).__name__ != "BPE"
        or tokenizer.truncation is not None
        or lost is None
        or not all(_keeps_split(part) for part in pre_parts)
        or not all(_keeps_normal(part) for part in normalizers)
        # Such a token takes all the spaces beside it.
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return None
    shrinks = _NFC_SHRINKS if any(part["type"] == "NFC" for part in normalizers) else 1
    return TokenRoom(most_characters=shrinks * max(len(token) for token in vocabulary), lost=lost)


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Give the parts of a normalizer or pre-tokenizer as tokenizer.json has them."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()))


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if part["type"] == "Sequence":
        for inner in part.get("pretokenizers") or part.get("normalizers") or []:
            yield from _flat(inner)
    else:
        yield part


def _lost(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> str | None:
    """Find the characters that have no token; None where that may be any, or many be one token together."""
    if any(part["type"] == "ByteLevel" for part in _parts(tokenizer.pre_tokenizer)):
        # Beyond ASCII each character has a byte from 0x80 to 0xBF: the last one of U+0080 to U+00BF.
        letters = [_byte_letters(chr(code))[-1] for code in range(0xC0)]
        lost = [chr(code) for code, letter in enumerate(letters) if letter not in vocabulary]
        return "".join(lost) if not lost or lost[-1].isascii() else None
    knows_bytes = getattr(tokenizer.model, "byte_fallback", False) and all(
        f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    )
    return "" if knows_bytes else None


def _byte_letters(text: str) -> str:
    """Give the letters that stand for a text's bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


def _keeps_split(part: dict[str, Any]) -> bool:
    return part["type"] in ("ByteLevel", "Digits", "Metaspace") or (
        part["type"] == "Split" and part["behavior"] != "Removed"
    )


def _keeps_normal(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        return len(part["pattern"].get("String", "")) == 1 and len(part["content"]) > 0
    return part["type"] in ("NFC", "Prepend")
