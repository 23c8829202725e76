"""A tokenizer and an embedding that fit: each token that a text can turn into has its row."""

import json
import logging
from typing import Any

from coreinfer.bundles.errors import ConfigError
from tokenizers import Tokenizer

__all__ = ["fit_tokenizer"]

_log = logging.getLogger(__name__)
_SHOWN = 5


def fit_tokenizer(tokenizer: Any, num_rows: int, name: str) -> None:
    """Take tokens that the embedding has no row for out of a tokenizer; their text becomes text like any other.

    Gemma 3, for one, comes with a token for images that models of text alone do not have.

    Args:
        tokenizer: of transformers, in its fast form; changed in place.
        num_rows: of the embedding.
        name: what the user called the model.
    Raises:
        ConfigError: texts need such tokens: they are no added ones, or end or surround every text.
    """
    beyond = _beyond(tokenizer.backend_tokenizer, num_rows)
    if not beyond:
        return
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < num_rows]
    vocabulary = data["model"].get("vocab")
    if isinstance(vocabulary, dict):
        added = {token for token in beyond if token in tokenizer.get_added_vocab()}
        data["model"]["vocab"] = {token: token_id for token, token_id in vocabulary.items() if token not in added}
    fitted = _parsed(data)
    needed = fitted is None or _beyond(fitted, num_rows) or max(fitted.encode("").ids, default=0) >= num_rows
    if needed or tokenizer.eos_token in beyond or tokenizer.bos_token in beyond:
        raise ConfigError(
            f"--model {name}: its tokenizer has {_some(beyond)} beyond the {num_rows} rows of its embedding; "
            "give the tokenizer.json that belongs to these weights"
        )
    _log.warning("--model %s: %s left out of the tokenizer, for which the embedding has no row", name, _some(beyond))
    tokenizer._tokenizer = fitted
    if tokenizer.pad_token in beyond:
        tokenizer.pad_token = None


def _parsed(data: dict[str, Any]) -> Tokenizer | None:
    try:
        return Tokenizer.from_str(json.dumps(data))
    except Exception:
        # tokenizers raises bare Exceptions: merges, or tokens around a text, need what was left out.
        return None


def _beyond(tokenizer: Tokenizer, num_rows: int) -> list[str]:
    """Tokens without a row, by id."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return sorted((token for token, token_id in ids.items() if token_id >= num_rows), key=ids.__getitem__)


def _some(tokens: list[str]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return shown if len(tokens) <= _SHOWN else f"{shown} and {len(tokens) - _SHOWN} more tokens"
