"""How a text begins as token ids: what compiler, runtime and evaluation have to agree on."""

from typing import Any

__all__ = ["encoded", "text_ids", "text_spans"]

Span = tuple[int, int]

_LONG_CHARACTERS = 1 << 14
"""From here on a text is encoded as a batch, which leaves Python's lock to other threads for as long as it takes."""


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Turn a text that is to be continued into token ids.

    It begins as the tokenizer begins a text of its own (BOS, where there is one), once, also where the text says so
    itself. What the tokenizer puts at the end of a text (EOS) is left out: nothing could follow it.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; none of this folder's modules needs that package.
    """
    return text_spans(tokenizer, text)[0]


def text_spans(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Like `text_ids`, and the characters of `text` that each token stands for: from, up to."""
    encoding = encoded(tokenizer, text, add_special_tokens=True)
    ids, spans = list(encoding.ids), list(encoding.offsets)
    # 1 marks what the tokenizer added; control tokens that the text holds are 0.
    own = [index for index, added in enumerate(encoding.special_tokens_mask) if not added]
    if not own:
        return ids, spans
    start, end = own[0], own[-1] + 1
    if start and ids[0] == ids[start]:
        return ids[start:end], spans[start:end]
    return ids[:end], spans[:end]


def encoded(tokenizer: Any, text: str, *, add_special_tokens: bool) -> Any:
    """Encode a text; other Python threads run meanwhile if that takes long."""
    if len(text) < _LONG_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return encoding
