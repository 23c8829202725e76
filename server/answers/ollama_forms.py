"""From tokens to answers in Ollama's form: whole, or one line of JSON after another."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coreinfer.runtime import Token
from coreinfer.runtime.prompts.tools import CallReader

from .ollama_responses import OllamaCallOut, OllamaChat, OllamaFunctionOut, OllamaMessage, OllamaText

__all__ = ["OllamaChatForm", "OllamaForm", "OllamaTextForm"]

_NANOSECONDS = 1_000_000_000


class OllamaForm(Protocol):
    """Puts tokens into an answer. Each answer has a form of its own, which remembers what it saw."""

    def line(self, tokens: Sequence[Token]) -> OllamaChat | OllamaText:
        """Put the next tokens into a line; all of them into an answer."""


@dataclass(frozen=True, kw_only=True)
class OllamaTextForm:
    """An answer of /api/generate."""

    model: str

    def line(self, tokens: Sequence[Token]) -> OllamaText:
        """Put the next tokens into a line; all of them into an answer."""
        return OllamaText(model=self.model, response="".join(token.text for token in tokens), **_end(tokens[-1]))


@dataclass(frozen=True, kw_only=True)
class OllamaChatForm:
    """An answer of /api/chat; the reader finds its calls, None where no tools were offered."""

    model: str
    reader: CallReader | None

    def line(self, tokens: Sequence[Token]) -> OllamaChat:
        """Put the next tokens into a line; all of them into an answer."""
        num_known = len(self.reader.calls) if self.reader else 0
        content = "".join(self._content(token) for token in tokens)
        new = self.reader.calls[num_known:] if self.reader else []
        calls = [
            OllamaCallOut(function=OllamaFunctionOut(name=call.name, arguments=json.loads(call.arguments)))
            for call in new
        ]
        message = OllamaMessage(content=content, tool_calls=calls or None)
        return OllamaChat(model=self.model, message=message, **_end(tokens[-1]))

    def _content(self, token: Token) -> str:
        if self.reader is None:
            return token.text
        content = self.reader.push(token.text)
        return content + self.reader.finish() if token.finish_reason else content


def _end(last: Token) -> dict[str, Any]:
    if not last.finish_reason:
        return {"done": False}
    read, decoded = (round(seconds * _NANOSECONDS) for seconds in (last.prefill_seconds, last.decode_seconds))
    return {
        "done": True,
        "done_reason": last.finish_reason,
        "total_duration": read + decoded,
        "load_duration": 0,
        "prompt_eval_count": last.num_prompt_tokens,
        "prompt_eval_duration": read,
        "eval_count": last.num_tokens,
        "eval_duration": decoded,
    }
