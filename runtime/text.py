"""From token ids to text, piece by piece, up to a stop string."""

from collections.abc import Sequence

from coreinfer.bundles.errors import ConfigError, join_problems
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

__all__ = ["TextStream", "check_stop"]

_MAX_STOPS, _MAX_STOP_CHARACTERS = 256, 1000
"""All are looked for after each token, and so is each beginning of each."""


class TextStream:
    """Decodes one generation's tokens as they come.

    All that comes out, put together, is the decoded text of all tokens without special ones, or that text up to the
    first stop string: the one that is whole first, of those the longest.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start a text.

        Args:
            tokenizer: the model's.
            stop: strings that end the text; they are not part of it.
        Raises:
            ConfigError: a stop string is empty or no string.
        """
        check_stop(stop)
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._open_ids = _open_ids(tokenizer)
        self._token_ids: list[int] = []
        self._pending: list[int] = []
        self._num_decoded = 0
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string appeared; whatever is pushed after it is ignored."""
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
        self._token_ids.append(token_id)
        self._pending.append(token_id)
        if token_id in self._open_ids or self._tokenizer.id_to_token(token_id) is None:
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
        text = self._release(self._tokenizer.decode(self._token_ids, skip_special_tokens=True)[self._num_decoded :])
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        self._num_decoded += len(text)
        text = self._held + text
        if (start := _stop_start(text, self._stop)) is not None:
            self._stopped, self._held = True, ""
            return text[:start]
        num_final = len(text) - _num_held(text, self._stop)
        self._held = text[num_final:]
        return text[:num_final]


def check_stop(stop: object) -> None:
    """Check the stop strings of a generation.

    Raises:
        ConfigError: they are no list of strings that are not empty, or too many or too long.
    """
    # A bare string is a sequence of strings too: each of its characters would stop the text.
    if isinstance(stop, (str, bytes)) or not isinstance(stop, Sequence):
        raise ConfigError(f"stop: expected a list of strings, got {type(stop).__name__} {str(stop)[:40]!r}")
    if len(stop) > _MAX_STOPS:
        raise ConfigError(f"stop: expected at most {_MAX_STOPS} strings, got {len(stop)}")
    wrong = [(index, text) for index, text in enumerate(stop) if not isinstance(text, str) or not text]
    if wrong:
        raise ConfigError(
            join_problems(
                [f"stop[{index}]: expected a string that is not empty, got {text!r}" for index, text in wrong]
            )
        )
    for index, text in enumerate(stop):
        if len(text) > _MAX_STOP_CHARACTERS:
            raise ConfigError(f"stop[{index}]: expected at most {_MAX_STOP_CHARACTERS} characters, got {len(text)}")


def _open_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Find the tokens after which the text so far can still change.

    A decoder with byte fallback decodes a run of byte tokens as a whole: "A" becomes a replacement character when an
    invalid byte follows. DecodeStream gives the "A" away and then raises, so it gets such a run only when it is over,
    which special tokens, that are left out of the text, do not bring about.
    """
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return frozenset(special)
    byte_ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(special.union(token_id for token_id in byte_ids if token_id is not None))


def _stop_start(text: str, stop: Sequence[str]) -> int | None:
    found = [(start + len(string), start) for string in stop if (start := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _num_held(text: str, stop: Sequence[str]) -> int:
    prefixes = (string[:size] for string in stop for size in range(1, min(len(string), len(text) + 1)))
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
