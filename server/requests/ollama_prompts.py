"""From requests of Ollama's interface to prompts and options of a generation."""

import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from coreinfer.runtime import GenerationOptions
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.server.server_config import ServerConfig

from .ollama_bodies import OllamaChatRequest, OllamaFields, OllamaMessageIn, OllamaOptions, OllamaTextRequest

__all__ = ["chat_prompt", "ollama_options", "text_prompt"]

_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""What a request gets where it does not say, as at Ollama."""
_SAME = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")


def text_prompt(body: OllamaTextRequest) -> Prompt:
    """The prompt of /api/generate: what a user says (with `raw` a text), after a system message if there is one."""
    if not body.system:
        return body.prompt
    return [{"role": "system", "content": body.system}, {"role": "user", "content": body.prompt}]


def chat_prompt(messages: Sequence[OllamaMessageIn]) -> list[dict[str, Any]]:
    """Messages as the runtime takes them. Ollama's calls have no ids: results answer them in their order."""
    ids, open_calls = (f"call{number:05d}" for number in count()), list[tuple[str, str]]()
    return [_plain(message, ids, open_calls) for message in messages]


def _plain(message: OllamaMessageIn, ids: Iterator[str], open_calls: list[tuple[str, str]]) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        calls = [(call.id or next(ids), call.function) for call in message.tool_calls]
        open_calls[:] = [(call_id, function.name) for call_id, function in calls]
        plain["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": function.name, "arguments": _text(function)}}
            for call_id, function in calls
        ]
    if message.role == "tool":
        plain["tool_call_id"] = _answered(message.tool_name, open_calls) or next(ids)
    return plain


def _text(function: Any) -> str:
    return json.dumps(function.arguments, ensure_ascii=False)


def _answered(name: str | None, open_calls: list[tuple[str, str]]) -> str | None:
    """The id of the first call that is not answered yet, of that function if it is named."""
    for number, (call_id, called) in enumerate(open_calls):
        if name in (None, called):
            del open_calls[number]
            return call_id
    return None


def ollama_options(body: OllamaFields, config: ServerConfig) -> GenerationOptions:
    """Translate options; as at Ollama, an answer ends where it may not go on, however much was asked for.

    Raises:
        ConfigError: options do not go together.
    """
    asked = body.options or OllamaOptions()
    given = {name: value for name in _SAME if (value := getattr(asked, name)) is not None}
    if asked.repeat_penalty is not None:
        given["repetition_penalty"] = asked.repeat_penalty
    tools = body.tools if isinstance(body, OllamaChatRequest) else None
    most = config.max_new_tokens
    return GenerationOptions(
        **{**_DEFAULTS, **given},
        seed=asked.seed if asked.seed is not None and asked.seed >= 0 else None,
        stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop or (),
        max_new_tokens=min(asked.num_predict, most) if asked.num_predict and asked.num_predict > 0 else most,
        json_schema=body.schema_to_follow,
        tools=[tool.plain for tool in tools] if tools else None,
        raw=isinstance(body, OllamaTextRequest) and bool(body.raw),
    )
