"""From tokens to the answers that clients know: whole, or one event after another."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from coreinfer.runtime import Token
from coreinfer.runtime.prompts.tools import CallReader, ToolCall
from pydantic import BaseModel

from .response_bodies import (
    CallDelta,
    CallOut,
    Chat,
    ChatChoice,
    ChatChunk,
    ChunkChoice,
    Completion,
    CompletionChoice,
    Delta,
    Figures,
    Finish,
    FunctionOut,
    Message,
    PromptTokensDetails,
    Usage,
)
from .token_logprobs import Word, chat_logprobs, completion_logprobs

__all__ = ["AnswerForm", "ChatForm", "CompletionForm", "Header", "UsageEvents"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all events of an answer carry.

    Attributes:
        model: its name.
        fingerprint: returns that of the bundle; called when there are tokens.
        word: the text of a token, for log-probabilities.
        num_alike: choices of each prompt; they come one after another.
    """

    model: str
    fingerprint: Callable[[], str]
    word: Word
    num_alike: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, prefix: str) -> dict[str, Any]:
        """The header as keywords of an answer."""
        return {
            "id": f"{prefix}-{self.id}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint(),
        }

    def usage(self, lasts: Sequence[Token]) -> Usage:
        """Sum up what all choices took, by their last tokens; a prompt counts once, as it was read first."""
        prompts = lasts[:: self.num_alike]
        num_prompt_tokens = sum(last.num_prompt_tokens for last in prompts)
        num_tokens = sum(last.num_tokens for last in lasts)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(last.num_cached_tokens for last in prompts)),
        )


class AnswerForm(Protocol):
    """Puts tokens into an answer. Each answer has a form of its own, which remembers what it saw of each choice."""

    @property
    def header(self) -> Header:
        """What all events carry."""

    def whole(self, choices: Sequence[Sequence[Token]]) -> Chat | Completion:
        """Put all tokens of each choice into one answer."""

    def chunk(self, index: int, token: Token) -> ChatChunk | Completion:
        """Put the next token of a choice into an event."""


class UsageEvents:
    """Adds the event with usage figures, which comes last, where it was asked for."""

    def __init__(self, form: AnswerForm, num_choices: int, *, wanted: bool) -> None:
        """Begin an answer."""
        self._form, self._wanted = form, wanted
        self._lasts: list[Token | None] = [None] * num_choices

    def events(self, index: int, token: Token) -> list[BaseModel]:
        """Turn the next token of a choice into events."""
        event = self._form.chunk(index, token)
        if token.finish_reason:
            self._lasts[index] = token
        lasts = [last for last in self._lasts if last is not None]
        if not token.finish_reason or not self._wanted or len(lasts) < len(self._lasts):
            return [event]
        usage = self._form.header.usage(lasts)
        return [event, event.model_copy(update={"choices": [], "usage": usage, "coreinfer": None})]


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """A chat's answer; the readers find the calls in each choice, None where no tools were offered."""

    header: Header
    readers: Sequence[CallReader | None]

    def whole(self, choices: Sequence[Sequence[Token]]) -> Chat:
        """Put all tokens of each choice into one answer."""
        lasts = [tokens[-1] for tokens in choices]
        return Chat(
            **self.header.fields("chatcmpl"),
            choices=[self._choice(index, tokens) for index, tokens in enumerate(choices)],
            usage=self.header.usage(lasts),
            coreinfer=_figures(lasts[0]),
        )

    def chunk(self, index: int, token: Token) -> ChatChunk:
        """Put one token into an event; the first says whose message it is, and first and last carry figures."""
        is_first = token.num_tokens == 1
        content, calls = self._read(index, token)
        choice = ChunkChoice(
            index=index,
            delta=Delta(role="assistant" if is_first else None, content=content, tool_calls=calls or None),
            logprobs=chat_logprobs(self.header.word, [token]),
            finish_reason=self._finish(index, token),
        )
        return ChatChunk(**self.header.fields("chatcmpl"), choices=[choice], coreinfer=_figures_at_edges(token))

    def _choice(self, index: int, tokens: Sequence[Token]) -> ChatChoice:
        content = "".join(self._read(index, token)[0] for token in tokens)
        reader = self.readers[index]
        calls = [_call(call) for call in reader.calls] if reader else []
        finish_reason = self._finish(index, tokens[-1])
        assert finish_reason is not None
        return ChatChoice(
            index=index,
            message=Message(content=None if calls and not content.strip() else content, tool_calls=calls or None),
            logprobs=chat_logprobs(self.header.word, tokens),
            finish_reason=finish_reason,
        )

    def _read(self, index: int, token: Token) -> tuple[str, list[CallDelta]]:
        """Split a token's text into content and the calls that became whole with it."""
        reader = self.readers[index]
        if reader is None:
            return token.text, []
        num_known = len(reader.calls)
        content = reader.push(token.text)
        if token.finish_reason:
            content += reader.finish()
        new = list(enumerate(reader.calls))[num_known:]
        return content, [CallDelta(index=number, **_call(call).model_dump()) for number, call in new]

    def _finish(self, index: int, token: Token) -> Finish | None:
        reader = self.readers[index]
        return "tool_calls" if token.finish_reason == "stop" and reader and reader.calls else _finish(token)


@dataclass(frozen=True, kw_only=True)
class CompletionForm:
    """A completion.

    Attributes:
        echoed: what each choice's text begins with.
        offsets: characters of each choice so far.
    """

    header: Header
    echoed: Sequence[str]
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Begin all choices."""
        object.__setattr__(self, "offsets", [0] * len(self.echoed))

    def whole(self, choices: Sequence[Sequence[Token]]) -> Completion:
        """Put all tokens of each choice into one answer."""
        lasts = [tokens[-1] for tokens in choices]
        return Completion(
            **self.header.fields("cmpl"),
            choices=[self._choice(index, tokens) for index, tokens in enumerate(choices)],
            usage=self.header.usage(lasts),
            coreinfer=_figures(lasts[0]),
        )

    def chunk(self, index: int, token: Token) -> Completion:
        """Put one token into an event; first and last carry figures."""
        choices = [self._choice(index, [token])]
        return Completion(**self.header.fields("cmpl"), choices=choices, coreinfer=_figures_at_edges(token))

    def _choice(self, index: int, tokens: Sequence[Token]) -> CompletionChoice:
        text = "".join(token.text for token in tokens)
        logprobs = completion_logprobs(self.header.word, tokens, self.offsets[index])
        self.offsets[index] += len(text)
        return CompletionChoice(
            index=index,
            text=self.echoed[index] + text if tokens[0].num_tokens == 1 else text,
            logprobs=logprobs,
            finish_reason=_finish(tokens[-1]),
        )


def _call(call: ToolCall) -> CallOut:
    return CallOut(id=call.id, function=FunctionOut(name=call.name, arguments=call.arguments))


def _figures_at_edges(token: Token) -> Figures | None:
    return _figures(token) if token.num_tokens == 1 or token.finish_reason else None


def _figures(token: Token) -> Figures:
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


def _finish(token: Token) -> Finish | None:
    # "cancelled" comes of an option that the server does not use.
    return cast("Finish | None", token.finish_reason)
