"""From token ids to text, piece by piece, up to a stop string."""

from collections.abc import Sequence

from coreinfer.bundles.shared.checks import raise_problems
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

__all__ = ["TextStream", "stop_problems", "text_after", "token_text"]

_MAX_STOPS, _MAX_STOP_CHARACTERS = 256, 1000
"""All are looked for after each token, and so is each beginning of each."""


class TextStream:
    """Decodes one generation's tokens as they come.

    All that comes out, put together, is what all tokens add to the text before them, without special ones, or that up
    to the first stop string: the one that is whole first, of those the longest.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        after_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Start a text.

        Args:
            tokenizer: the model's.
            stop: strings that end the text; they are not part of it. One that is a special token's name ends it where
                that token comes, whether or not special tokens are left out.
            after_ids: the tokens before it. Many decoders take the first blank of a text away, which is right only
                where nothing comes before it.
            skip_special_tokens: leave them out.
        Raises:
            ConfigError: a stop string is empty or no string.
        """
        raise_problems(stop_problems("stop", stop))
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = skip_special_tokens
        special = _special_ids(tokenizer)
        self._stop_ids = {token_id for token_id in special if tokenizer.id_to_token(token_id) in self._stop}
        self._decoder = DecodeStream(skip_special_tokens=skip_special_tokens)
        byte_ids = _byte_ids(tokenizer)
        # An unknown id, which does not end a run of bytes, is looked for only where there are such runs.
        self._has_bytes = bool(byte_ids)
        self._open_ids = byte_ids.union(special if skip_special_tokens else ())
        self._token_ids = _ids_before(tokenizer, after_ids, special)
        self._num_decoded = len(self._decode())
        if self._token_ids:
            self._decoder.step(tokenizer, list(self._token_ids))
        self._pending: list[int] = []
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string appeared; text that is pushed after it is ignored."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Take the next token.

        Args:
            token_id: ids that the tokenizer does not know have no text.
        Returns:
            The text that has become final, often empty: characters are whole, and none can belong to a stop string.
        """
        if self._stopped:
            return ""
        if token_id in self._stop_ids:
            text = self.flush()
            self._stopped = True
            return text
        self._token_ids.append(token_id)
        self._pending.append(token_id)
        if token_id in self._open_ids or (self._has_bytes and self._tokenizer.id_to_token(token_id) is None):
            return ""
        text = self._decoder.step(self._tokenizer, self._pending) or ""
        self._pending = []
        return self._release(text)

    def flush(self) -> str:
        """End the text, after the last token.

        Returns:
            What was held back: the start of a stop string that never came, or a character that is not whole, for
            which the tokenizer's decoder has a replacement. A stop string can still appear in it.
        """
        if self._stopped:
            return ""
        text = self._release(self._decode()[self._num_decoded :])
        rest, self._held = self._held, ""
        return text + rest

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip))

    def _release(self, text: str) -> str:
        self._num_decoded += len(text)
        text = self._held + text
        if (start := _stop_start(text, self._stop)) is not None:
            self._stopped, self._held = True, ""
            return text[:start]
        num_final = len(text) - _num_held(text, self._stop)
        self._held = text[num_final:]
        return text[:num_final]


def text_after(tokenizer: Tokenizer, before_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """Return the text that tokens add to the text before them, without special ones."""
    before = _ids_before(tokenizer, before_ids, _special_ids(tokenizer))
    num_before = len(tokenizer.decode(before, skip_special_tokens=True))
    return str(tokenizer.decode([*before, *token_ids], skip_special_tokens=True)[num_before:])


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text that one token adds to a text, a special one its name; half a character is a replacement."""
    before = _letter_ids(tokenizer)
    num_before = len(tokenizer.decode(before, skip_special_tokens=False))
    return str(tokenizer.decode([*before, token_id], skip_special_tokens=False)[num_before:])


def stop_problems(name: str, stop: object) -> list[str]:
    """Say what is wrong with the stop strings of a generation: a list of few, short strings that are not empty."""
    # A bare string is a sequence of strings too: each of its characters would stop the text.
    if isinstance(stop, (str, bytes)) or not isinstance(stop, Sequence):
        return [f"{name}: expected a list of strings, got {type(stop).__name__} {str(stop)[:40]!r}"]
    if len(stop) > _MAX_STOPS:
        return [f"{name}: expected at most {_MAX_STOPS} strings, got {len(stop)}"]
    return [problem for index, text in enumerate(stop) if (problem := _stop_problem(f"{name}[{index}]", text))]


def _stop_problem(name: str, text: object) -> str | None:
    if not isinstance(text, str) or not text:
        return f"{name}: expected a string that is not empty, got {text!r}"
    if len(text) > _MAX_STOP_CHARACTERS:
        return f"{name}: expected at most {_MAX_STOP_CHARACTERS} characters, got {len(text)}"
    return None


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Find the tokens after which the text so far can still change.

    A decoder with byte fallback decodes a run of byte tokens as a whole: "A" becomes a replacement character when an
    invalid byte follows. DecodeStream gives the "A" away and then raises, so it gets such a run only when it is over,
    which special tokens, where they are left out of the text, do not bring about.
    """
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    byte_ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in byte_ids if token_id is not None)


def _ids_before(tokenizer: Tokenizer, context_ids: Sequence[int], special_ids: frozenset[int]) -> list[int]:
    """Choose the tokens after which to decode: a letter where a first blank belongs to the text, else none.

    A letter stands for whatever the text before is: its last character may be of bytes that do not end with it.
    """
    if not context_ids:
        return []
    if (last_id := context_ids[-1]) not in special_ids:
        return _letter_ids(tokenizer)
    # Some tokenizers begin anew after a special token, so that a first blank there is theirs and not the text's.
    name = str(tokenizer.id_to_token(last_id))
    again = tokenizer.decode(
        tokenizer.encode(f"{name}{_LETTER}", add_special_tokens=False).ids, skip_special_tokens=False
    )
    return [] if again.endswith(f" {_LETTER}") else _letter_ids(tokenizer)


_LETTER = "a"


def _letter_ids(tokenizer: Tokenizer) -> list[int]:
    """Find tokens that are one letter, wherever the text begins; none where the tokenizer does not know it."""
    token_ids = list(tokenizer.encode(_LETTER, add_special_tokens=False).ids)
    return token_ids if tokenizer.decode(token_ids, skip_special_tokens=True) == _LETTER else []


def _stop_start(text: str, stop: Sequence[str]) -> int | None:
    found = [(start + len(string), start) for string in stop if (start := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _num_held(text: str, stop: Sequence[str]) -> int:
    prefixes = (string[:size] for string in stop for size in range(1, min(len(string), len(text) + 1)))
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
