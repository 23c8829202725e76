"""From tokens to the answers that clients know: whole, or one event after another."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from coreinfer.runtime import Token

from .responses import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ContentLogprob,
    Delta,
    Figures,
    Finish,
    Message,
    PromptTokensDetails,
    TokenLogprob,
    Usage,
)

__all__ = ["Header", "chat_answer", "chat_chunk", "completion_answer", "completion_chunk", "figures", "usage_chunk"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all events of an answer carry.

    Attributes:
        model: its name.
        fingerprint: of the bundle.
        word: the text of a token, for log-probabilities.
    """

    model: str
    fingerprint: str
    word: Callable[[int], str]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, prefix: str) -> dict[str, Any]:
        """The header as keywords of an answer."""
        return {
            "id": f"{prefix}-{self.id}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def chat_answer(header: Header, tokens: Sequence[Token]) -> Chat:
    """Put all tokens of a generation into a chat's answer."""
    last = tokens[-1]
    finish_reason = _finish(last)
    assert finish_reason is not None
    choice = ChatChoice(
        message=Message(content="".join(token.text for token in tokens)),
        logprobs=_chat_logprobs(header, tokens),
        finish_reason=finish_reason,
    )
    return Chat(**header.fields("chatcmpl"), choices=[choice], usage=_usage(last), coreinfer=figures(last))


def chat_chunk(header: Header, token: Token) -> ChatChunk:
    """Put one token into an event; the first says whose message it is, and first and last carry figures."""
    is_first = token.num_tokens == 1
    choice = ChunkChoice(
        delta=Delta(role="assistant" if is_first else None, content=token.text),
        logprobs=_chat_logprobs(header, [token]),
        finish_reason=_finish(token),
    )
    figures_or_none = figures(token) if is_first or token.finish_reason else None
    return ChatChunk(**header.fields("chatcmpl"), choices=[choice], coreinfer=figures_or_none)


def completion_answer(header: Header, tokens: Sequence[Token]) -> Completion:
    """Put all tokens of a generation into a completion."""
    answer = _completion(header, tokens, offset=0)
    return answer.model_copy(update={"usage": _usage(tokens[-1]), "coreinfer": figures(tokens[-1])})


def completion_chunk(header: Header, token: Token, *, offset: int) -> Completion:
    """Put one token into an event.

    Args:
        offset: characters that came before it.
    """
    chunk = _completion(header, [token], offset=offset)
    is_edge = token.num_tokens == 1 or token.finish_reason
    return chunk.model_copy(update={"coreinfer": figures(token)}) if is_edge else chunk


def usage_chunk(chunk: ChatChunk | Completion, last: Token) -> ChatChunk | Completion:
    """Make the event that a client gets last if it asks for usage figures: without choices."""
    return chunk.model_copy(update={"choices": [], "usage": _usage(last), "coreinfer": None})


def figures(token: Token) -> Figures:
    """Say what was measured up to a token."""
    return Figures(
        cluster=token.cluster,
        label=token.cluster_label,
        distance=token.distance,
        familiar=token.familiar,
        fallback=token.fallback,
        mode=token.mode,
        path=[step.cluster for step in token.path],
        prefill_seconds=token.prefill_seconds,
        decode_seconds=token.decode_seconds,
        tokens_per_second=token.decode_tokens_per_second,
    )


def _usage(last: Token) -> Usage:
    return Usage(
        prompt_tokens=last.num_prompt_tokens,
        completion_tokens=last.num_tokens,
        total_tokens=last.num_prompt_tokens + last.num_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=last.num_cached_tokens),
    )


def _completion(header: Header, tokens: Sequence[Token], *, offset: int) -> Completion:
    choice = CompletionChoice(
        text="".join(token.text for token in tokens),
        logprobs=_completion_logprobs(header, tokens, offset),
        finish_reason=_finish(tokens[-1]),
    )
    return Completion(**header.fields("cmpl"), choices=[choice])


def _chat_logprobs(header: Header, tokens: Sequence[Token]) -> ChatLogprobs | None:
    content = [
        ContentLogprob(
            **_logprob(header.word(token.token_id), token.logprob),
            top_logprobs=[TokenLogprob(**_logprob(top.text, top.logprob)) for top in token.top_logprobs],
        )
        for token in tokens
        if token.logprob is not None
    ]
    return ChatLogprobs(content=content) if content else None


def _logprob(word: str, logprob: float) -> dict[str, Any]:
    # A replacement character stands for a part of a character, whose bytes are not known here.
    return {"token": word, "logprob": logprob, "bytes": None if "\ufffd" in word else list(word.encode())}


def _completion_logprobs(header: Header, tokens: Sequence[Token], offset: int) -> CompletionLogprobs | None:
    answer = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in tokens:
        if token.logprob is not None:
            answer.tokens.append(header.word(token.token_id))
            answer.token_logprobs.append(token.logprob)
            # Parts of characters have one text: the likeliest of them stands for it.
            answer.top_logprobs.append({top.text: top.logprob for top in reversed(token.top_logprobs)})
            answer.text_offset.append(offset)
        offset += len(token.text)
    return answer if answer.tokens else None


def _finish(token: Token) -> Finish | None:
    # "cancelled" comes of an option that the server does not use.
    return cast(Finish | None, token.finish_reason)
