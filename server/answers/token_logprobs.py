"""Log-probabilities of tokens, as chats and completions have them."""

from collections.abc import Callable, Sequence
from typing import Any

from coreinfer.runtime import Token

from .response_bodies import ChatLogprobs, CompletionLogprobs, ContentLogprob, TokenLogprob

__all__ = ["Word", "chat_logprobs", "completion_logprobs"]

Word = Callable[[int], str]


def chat_logprobs(word: Word, tokens: Sequence[Token]) -> ChatLogprobs | None:
    """Return those of a chat's tokens; None if they were not asked for."""
    content = [
        ContentLogprob(
            **_logprob(word(token.token_id), token.logprob),
            top_logprobs=[TokenLogprob(**_logprob(top.text, top.logprob)) for top in token.top_logprobs],
        )
        for token in tokens
        if token.logprob is not None
    ]
    return ChatLogprobs(content=content) if content else None


def completion_logprobs(word: Word, tokens: Sequence[Token], offset: int) -> CompletionLogprobs | None:
    """Return those of a completion's tokens; None if they were not asked for.

    Args:
        offset: characters that came before them.
    """
    if all(token.logprob is None for token in tokens):
        return None
    answer = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in tokens:
        if token.logprob is not None:
            answer.tokens.append(word(token.token_id))
            answer.token_logprobs.append(token.logprob)
            # Parts of characters have one text: the likeliest of them stands for it.
            answer.top_logprobs.append({top.text: top.logprob for top in reversed(token.top_logprobs)})
            answer.text_offset.append(offset)
        offset += len(token.text)
    return answer


def _logprob(word: str, logprob: float) -> dict[str, Any]:
    # A replacement character stands for a part of a character, whose bytes are not known here.
    return {"token": word, "logprob": logprob, "bytes": None if "\ufffd" in word else list(word.encode())}
