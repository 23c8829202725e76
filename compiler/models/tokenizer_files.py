"""A model's tokenizer and chat templates as its files have them."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from .source_files import source_file
from .sources import ModelSource

__all__ = ["chat_templates", "check_templates", "special_tokens", "with_own_file"]

_log = logging.getLogger(__name__)
_SHOWN = 6
_SAMPLES = (
    "The quick brown fox doesn't jump over 12,345 lazy dogs.",
    "def main(x):\n    return [x, 3.14]  # 50%\n\n\n",
    "  Zwei größere Wörter: ÄRGER, naïve cafés\tund Übermut",
    "你好,世界! こんにちは 🙂👩‍👧",
    "<b>HTTP://example.org/?q=a_b&c=d</b>  ",
)


def with_own_file(tokenizer: Any, source: ModelSource) -> Any:
    """Put the model's own `tokenizer.json`, where there is one, in the place of what transformers made of it.

    The class that `tokenizer_config.json` names may rebuild a tokenizer, with parts that the file does not have; the
    file is what the model was trained with.

    Args:
        tokenizer: of transformers, as `AutoTokenizer` returns it.
    Raises:
        ConfigError: the file cannot be read.
    """
    path = source_file(source, "tokenizer.json")
    if path is None:
        return tokenizer
    try:
        own = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions.
        raise ConfigError(f"--model {source.name}: its tokenizer.json cannot be read ({error})") from error
    _add_tokens(own, source)
    made = tokenizer.backend_tokenizer
    if own.to_str() == made.to_str():
        return tokenizer
    if (example := _difference(own, made)) is not None:
        text, own_tokens, made_tokens = example
        _log.warning(
            "%s: tokenizer.json splits text otherwise than transformers' %s: in %r comes %s, not %s; the file counts",
            source.name,
            type(tokenizer).__name__,
            text,
            " ".join(own_tokens),
            " ".join(made_tokens),
        )
    # A class may also have names for tokens that the model does not know.
    names = {
        name: token for name, token in tokenizer.special_tokens_map.items() if own.token_to_id(str(token)) is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=tokenizer.chat_template, **names)


def chat_templates(tokenizer: Any) -> Mapping[str, str]:
    """Return a tokenizer's chat templates: `default`, and `tool_use` where conversations with tools have their own.

    Raises:
        ConfigError: there are several, and none of them is the default.
    """
    found = tokenizer.chat_template
    if not found:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if "default" not in found and len(found) > 1:
        raise ConfigError(
            f"chat templates: expected one called default, got {', '.join(sorted(found))}; name one of them so in the "
            "model's tokenizer_config.json"
        )
    default = found["default"] if "default" in found else next(iter(found.values()))
    return {"default": default, **({"tool_use": found["tool_use"]} if "tool_use" in found else {})}


def special_tokens(tokenizer: Any) -> Mapping[str, str]:
    """Names and texts of a tokenizer's special tokens, as chat templates use them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def check_templates(tokenizer: Any, name: str) -> None:
    """Look at a tokenizer's chat templates before anything is computed; say which are left out.

    Args:
        name: of the model.
    Raises:
        ConfigError: as `chat_templates`.
    """
    kept, found = chat_templates(tokenizer), tokenizer.chat_template
    if isinstance(found, dict) and (
        others := sorted(template for template in found if found[template] not in kept.values())
    ):
        _log.warning("%s: chat templates left out: %s; kept: %s", name, ", ".join(others), ", ".join(kept))


def _add_tokens(own: Tokenizer, source: ModelSource) -> None:
    """Add the tokens that only `tokenizer_config.json` has, or that are control tokens only there."""
    path = source_file(source, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    stated = config.get("added_tokens_decoder") or {}
    known = own.get_added_tokens_decoder()
    for token_id, fields in sorted(stated.items(), key=lambda item: int(item[0])):
        before = known.get(int(token_id))
        if before is None or (fields.get("special") and not before.special):
            token = AddedToken(**fields)
            own.add_special_tokens([token]) if token.special else own.add_tokens([token])


def _difference(own: Tokenizer, made: Tokenizer) -> tuple[str, list[str], list[str]] | None:
    """Find a text that two tokenizers split otherwise, and the first tokens that differ."""
    for text in _SAMPLES:
        one = own.encode(text)
        try:
            other = made.encode(text)
        except Exception:  # What a class made need not even work: the file counts all the more.
            return text, one.tokens[:_SHOWN], ["nothing"]
        if one.ids != other.ids:
            pairs = zip(one.ids, other.ids, strict=False)
            start = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one.ids), len(other.ids)))
            return text, one.tokens[start : start + _SHOWN], other.tokens[start : start + _SHOWN]
    return None
