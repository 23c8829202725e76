"""Answers that follow a JSON schema: llguidance says, token by token, how the text may continue."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import ConfigError
from coreinfer.bundles.shared.extras import needs_extra
from tokenizers import Tokenizer

__all__ = ["JsonGrammar", "JsonGrammars"]

_log = logging.getLogger(__name__)

Logits = npt.NDArray[np.float32]

_MAX_SCHEMA_CHARACTERS = 1 << 16
"""A schema of 5,000 properties takes llguidance 10 seconds, in which nobody else is answered."""


class JsonGrammars:
    """Makes grammars for one tokenizer, which llguidance reads once: when the first schema comes, or before."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Note the tokenizer; llguidance is imported when a schema comes.

        Args:
            vocab_size: number of logits, which may be more or fewer than the tokenizer has tokens.
            eos_token_ids: tokens that end a text.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._known: Any = None

    def prepare(self) -> None:
        """Read the tokenizer before a schema comes: that takes up to a second, in which no other thread runs.

        Where llguidance is not installed or cannot read the tokenizer, the first schema's error says so.
        """
        try:
            self._tokens("json_schema")
        except ConfigError as error:
            _log.info("%s", error)

    def grammar(self, schema: Mapping[str, Any] | str) -> "JsonGrammar":
        """Begin a text that follows a schema.

        Raises:
            ConfigError: llguidance is not installed, or it does not understand the schema.
        """
        matcher = _matcher_class("json_schema")
        text = _schema_text(schema)
        try:
            grammar = matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise ConfigError(f"json_schema: {_one_line(error)}") from error
        return self._begin(grammar, "json_schema")

    def calls(self, grammar: str) -> "JsonGrammar":
        """Begin a text that follows a grammar of calls, by `call_grammar`.

        Raises:
            ConfigError: llguidance is not installed, or it does not understand a schema of the tools.
        """
        return self._begin(grammar, "tools")

    def _begin(self, grammar: str, option: str) -> "JsonGrammar":
        matcher = _matcher_class(option)(self._tokens(option), grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"{option}: {_one_line(matcher.get_error())}")
        return JsonGrammar(matcher, self._vocab_size, option)

    def _tokens(self, option: str) -> Any:
        """What llguidance knows of the tokenizer."""
        if self._known is None:
            with needs_extra(option, "json"):
                from llguidance import LLTokenizer
            self._known = self._read_tokenizer(LLTokenizer)
        return self._known

    def _read_tokenizer(self, reader: Callable[..., Any]) -> Any:
        # llguidance must know of tokens that the model has no logit for; masks are cut off before them.
        num_ids = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        try:
            return reader(
                self._tokenizer.to_str(), n_vocab=max(self._vocab_size, num_ids), eos_token=list(self._eos_token_ids)
            )
        except ValueError as error:
            raise ConfigError(f"json_schema: llguidance does not read this tokenizer ({_one_line(error)})") from error


class JsonGrammar:
    """Follows one text."""

    def __init__(self, matcher: Any, vocab_size: int, option: str) -> None:
        """Begin a text.

        Args:
            matcher: an llguidance LLMatcher.
            option: that the schema came with, for messages.
        """
        self._matcher = matcher
        self._option = option
        self._vocab_size = vocab_size

    def masked(self, logits: Logits) -> Logits:
        """Return logits in which tokens that the text cannot continue with are minus infinity.

        Tokens that end a text are allowed where the text is whole.

        Args:
            logits: (vocab,) float32; left as they are.
        Raises:
            ConfigError: no text can follow the schema, for example one that refers only to itself; it became too
                complex for llguidance's limits, or continues with no token that has a logit.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        if not allowed.any():
            raise ConfigError(f"{self._option}: the text can only continue with tokens that the model has no logit for")
        return np.where(allowed, logits, np.float32(-np.inf))

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            # What follows the reason's line is llguidance's state.
            reason = str(self._matcher.get_error()).partition("\n")[0]
            raise ConfigError(f"{self._option}: the schema cannot be followed ({reason}); simplify it")


def _matcher_class(option: str) -> Any:
    with needs_extra(option, "json"):
        from llguidance import LLMatcher
    return LLMatcher


def _schema_text(schema: object) -> str:
    if not isinstance(schema, (str, Mapping)):
        raise ConfigError(f"json_schema: expected a schema or its text, got {type(schema).__name__}")
    try:
        data = json.loads(schema) if isinstance(schema, str) else dict(schema)
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema: expected JSON, got other text: {error}") from error
    if len(text) > _MAX_SCHEMA_CHARACTERS:
        raise ConfigError(
            f"json_schema: expected at most {_MAX_SCHEMA_CHARACTERS} characters, got {len(text)}; leave out what need "
            "not be followed to the letter"
        )
    if data is not True and not isinstance(data, dict):
        raise ConfigError(f"json_schema: expected an object or true, got {text[:40]}")
    # Any JSON; llguidance wants that as an object.
    return "{}" if data is True else text


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
