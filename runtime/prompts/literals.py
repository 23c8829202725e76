"""The content of messages is text: a control token's name in it is not a control token.

A chat template writes contents and control tokens into one string. So names of control tokens in contents are put
between marks before the template runs; in its result everything marked is text, and the rest is the template's.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.beginnings import encoded
from tokenizers import Tokenizer

__all__ = ["LiteralEncoder", "MarkedText", "Marks"]


@dataclass(frozen=True)
class MarkedText:
    """A text with marked pieces, which are read as text even if they look like control tokens.

    Attributes:
        pieces: in the order of the text; the second, the fourth and so on are the marked ones.
    """

    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    def after(self, num_characters: int) -> "MarkedText":
        """The text without its first characters."""
        rest = []
        for piece in self.pieces:
            rest.append(piece[num_characters:])
            num_characters = max(0, num_characters - len(piece))
        return MarkedText(tuple(rest))


class Marks:
    """A pair of marks that nobody who writes a text can know: digits, which no filter of a template changes."""

    def __init__(self, names: "re.Pattern[str]") -> None:
        """Draw the marks.

        Args:
            names: of control tokens.
        """
        self._names = names
        self._start, self._end = (str(secrets.randbelow(9 * 10**23) + 10**23) for _ in range(2))

    def mark(self, value: Any) -> Any:
        """Copy a message, a schema or other plain data with all names marked."""
        if isinstance(value, str):
            return self._names.sub(lambda found: f"{self._start}{found[0]}{self._end}", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, Sequence) else value

    def read(self, text: str) -> MarkedText:
        """Take the marks out of what a template made."""
        pieces = re.split(f"{self._start}({self._names.pattern}){self._end}", text)
        # A template that takes a content apart leaves marks alone.
        return MarkedText(tuple(piece.replace(self._start, "").replace(self._end, "") for piece in pieces))


class LiteralEncoder:
    """Turns marked texts into token ids, by a second tokenizer that is made when one is first needed.

    It is the first one, but that control tokens have names which no text holds. The pieces of a text that are not
    marked get these names in the place of the known ones: all else about a text is as ever, wherever it is cut.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Note the control tokens of a tokenizer."""
        self._tokenizer = tokenizer
        self._special = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        by_length = sorted(self._special, key=len, reverse=True)
        # Of names that begin alike the longest counts, as in the tokenizer.
        self.names = re.compile("|".join(map(re.escape, by_length))) if by_length else None

    def prepare(self) -> None:
        """Make the second tokenizer now, if the tokenizer is of a kind that can have one."""
        if self._special:
            with suppress(ConfigError):
                _ = self._hidden

    def holds_name(self, value: Any) -> bool:
        """Whether a control token's name is anywhere in messages, schemas or other plain data."""
        if isinstance(value, str):
            return self.names is not None and self.names.search(value) is not None
        if isinstance(value, Mapping):
            return any(self.holds_name(part) for item in value.items() for part in item)
        return isinstance(value, Sequence) and any(map(self.holds_name, value))

    def encode(self, marked: MarkedText) -> list[int]:
        """Turn a text into token ids, without what a tokenizer puts around one."""
        names, (tokenizer, hidden) = self.names, self._hidden
        assert names is not None
        text = "".join(
            piece if number % 2 else names.sub(lambda found: hidden[found[0]], piece)
            for number, piece in enumerate(marked.pieces)
        )
        known = {tokenizer.token_to_id(name): self._special[content] for content, name in hidden.items()}
        ids = encoded(tokenizer, text, add_special_tokens=False).ids
        return [known.get(token_id, token_id) for token_id in ids]

    @cached_property
    def _hidden(self) -> tuple[Tokenizer, dict[str, str]]:
        """The second tokenizer, and the names of its control tokens by those of the first."""
        # Characters of the private use area, that normalizers leave alone; drawn, so that no text can hold them.
        secret = secrets.token_hex(8)
        hidden = {content: f"\ue000{secret}.{token_id}\ue001" for content, token_id in self._special.items()}
        data = json.loads(self._tokenizer.to_str())
        for token in data["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
        data["post_processor"] = None
        _rename(data["model"], hidden)
        return Tokenizer.from_str(json.dumps(data)), hidden


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens of a tokenizer's model, so that no text becomes one of them.

    Raises:
        ConfigError: it is a model of a kind that is not known here.
    """
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    else:
        raise ConfigError(
            f"messages: they hold the name of a control token, which a {model.get('type')} tokenizer cannot read as "
            "text; leave it out, or set parse_special"
        )
    if model.get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
