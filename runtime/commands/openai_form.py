"""OpenAI's batch form: lines with a custom_id, a url and a body; answers as its API returns them.

Known fields of a body do what they say, or may only have the value that changes nothing; others are refused by name.
Null is the same as leaving a field out. The server's own reading of the same bodies (coreinfer.server) knows more
fields; what both know means the same.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.checks import one_of, whole_number
from coreinfer.runtime.generation import Generation
from coreinfer.runtime.options import GenerationOptions

from .batch_forms import Answered, Asked, Form, Result, Value, with_token_ids

__all__ = ["OPENAI"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LINE_FIELDS = ("custom_id", "method", "url", "body")
_COMPLETION_TOKENS = 16
"""What a completion gets where it does not say, as at OpenAI."""
_SAMPLING = (
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "mode",
    "token_share",
    "prompt_ffn",
    "skip_special_tokens",
)
"""Fields with the names of options; all but OpenAI's own are additions, as in the server."""
_CHAT_OPTIONS = ("tool_choice", "chat_template_kwargs", "continue_final_message", "parse_special")
_READ_APART = ("max_tokens", "stop")
_CHAT_READ_APART = ("messages", "max_completion_tokens", "tools", "response_format")
_WITHOUT_EFFECT: Mapping[str, Any] = {"n": 1, "stream": False, "parallel_tool_calls": True, "store": False}
_IGNORED = ("model", "user")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


def _read(value: Value, defaults: GenerationOptions) -> Asked:
    if unknown := [name for name in value if name not in _LINE_FIELDS]:
        raise ConfigError(f"{', '.join(unknown)}: not known beside {', '.join(_LINE_FIELDS)}; leave it out")
    if (method := value.get("method", "POST")) != "POST":
        raise ConfigError(f"method: expected POST, got {method!r}")
    if problem := one_of((CHAT, COMPLETIONS)).problem("url", value.get("url")):
        raise ConfigError(problem)
    body = value.get("body")
    if not isinstance(body, Mapping):
        raise ConfigError(f"body: expected a JSON object, got {type(body).__name__}")
    body = {name: item for name, item in body.items() if item is not None}
    return _read_chat(body, defaults) if value["url"] == CHAT else _read_completion(body, defaults)


def _read_chat(body: Value, defaults: GenerationOptions) -> Asked:
    _check_fields(body, (*_SAMPLING, *_CHAT_OPTIONS, *_READ_APART, *_CHAT_READ_APART))
    options = _with_sampling(body, defaults)
    own = {name: body[name] for name in _CHAT_OPTIONS if name in body}
    if "tools" in body:
        own["tools"] = _tools(body["tools"])
    if "response_format" in body:
        own["json_schema"] = _schema(body["response_format"])
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise ConfigError(f"messages: expected a list, got {type(messages).__name__}")
    plain = [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    return Asked(prompt=plain, options=replace(options, **own))


def _read_completion(body: Value, defaults: GenerationOptions) -> Asked:
    _check_fields(body, (*_SAMPLING, *_READ_APART, "prompt"))
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt: expected a text, got {type(prompt).__name__}; give each prompt a line of its own")
    options = _with_sampling(body, replace(defaults, raw=True, max_new_tokens=_COMPLETION_TOKENS))
    return Asked(prompt=prompt, options=options)


def _check_fields(body: Value, known: tuple[str, ...]) -> None:
    refused = [name for name in body if name not in (*known, *_WITHOUT_EFFECT, *_IGNORED)]
    if refused:
        raise ConfigError(f"{', '.join(refused)}: not known in a batch; leave it out")
    for name, only in _WITHOUT_EFFECT.items():
        # 1 and True are equal.
        if name in body and (body[name] != only or type(body[name]) is not type(only)):
            raise ConfigError(f"{name}: expected {only!r} in a batch, got {body[name]!r}")


def _with_sampling(body: Value, defaults: GenerationOptions) -> GenerationOptions:
    given = {name: body[name] for name in _SAMPLING if name in body}
    given.setdefault("temperature", 1.0)
    if "logit_bias" in given:
        given["logit_bias"] = with_token_ids(given["logit_bias"])
    if "stop" in body:
        given["stop"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    lengths = {name: body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
    for name, length in lengths.items():
        if problem := whole_number(1).problem(name, length):
            raise ConfigError(problem)
    if len(set(lengths.values())) > 1:
        raise ConfigError("max_tokens, max_completion_tokens: give one of the two")
    if lengths:
        # What was asked for must fit, as at OpenAI.
        given |= {"max_new_tokens": next(iter(lengths.values())), "whole_length": True}
    return replace(defaults, **given)


def _tools(tools: object) -> object:
    if not isinstance(tools, list):
        raise ConfigError(f"tools: expected a list, got {type(tools).__name__}")
    return [_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)] or None


def _tool(where: str, tool: object) -> Value:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise ConfigError(f'{where}: expected {{"type": "function", "function": {{...}}}}, got {str(tool)[:40]!r}')
    # A call that is asked for follows its schema anyhow; templates would show the field to the model.
    return {"type": "function", "function": {name: item for name, item in function.items() if name != "strict"}}


def _schema(form: object) -> object:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if not isinstance(form, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise ConfigError(f"response_format: expected type text, json_object or json_schema, got {str(form)[:40]!r}")
    if kind != "json_schema":
        return None if kind == "text" else {"type": "object"}
    named = form.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ConfigError(f"response_format.json_schema.schema: expected a JSON schema, got {str(schema)[:40]!r}")
    return schema


def _message(where: str, message: object) -> Value:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where}: expected an object with role and content, got {str(message)[:40]!r}")
    # An answer's message as it came, with its empty fields, is one of the next request.
    plain = {name: item for name, item in message.items() if item is not None and item != []}
    if unknown := [name for name in plain if name not in _MESSAGE_FIELDS]:
        raise ConfigError(f"{where}: {', '.join(unknown)}: not known in a batch; leave it out")
    if isinstance(content := plain.get("content"), list):
        plain["content"] = "\n".join(_text(f"{where}.content[{at}]", part) for at, part in enumerate(content))
    if "tool_calls" in plain:
        plain.setdefault("content", "")
    if plain.get("role") == "developer":
        plain["role"] = "system"
    return plain


def _text(where: str, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ConfigError(f'{where}: expected {{"type": "text", "text": ...}}, got {str(part)[:40]!r}')
    return text


def _answer(answered: Answered) -> Result:
    is_chat = answered.value["url"] == CHAT
    generation = answered.generation
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{answered.digest}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": answered.model,
        "choices": [_chat_choice(answered) if is_chat else _completion_choice(generation)],
        "usage": _usage(generation),
        "coreinfer": _figures(generation),
    }
    return _line(answered.line_id, answered.digest, 200, body, None)


def _refusal(line_id: str | int, digest: str, error: Exception) -> Result:
    wrong_request = isinstance(error, ConfigError)
    reason = {
        "message": " ".join(str(error).split()),
        "type": "invalid_request_error" if wrong_request else "server_error",
        "param": None,
        "code": None,
    }
    return _line(line_id, digest, 400 if wrong_request else 500, {"error": reason}, reason)


def _line(line_id: str | int, digest: str, status_code: int, body: Result, error: Result | None) -> Result:
    return {
        "id": f"batch_req_{digest}",
        "custom_id": line_id,
        "response": {"status_code": status_code, "request_id": f"req_{digest}", "body": body},
        "error": error,
    }


def _chat_choice(answered: Answered) -> Result:
    generation, content, calls = answered.generation, answered.generation.text, []
    reader = answered.prompts.call_reader(answered.asked.options.offered_tools)
    if reader is not None:
        content = reader.push(generation.text) + reader.finish()
        calls = [call.message_part for call in reader.calls]
    message: Result = {"role": "assistant", "content": None if calls and not content.strip() else content}
    message["refusal"] = None
    if calls:
        message["tool_calls"] = calls
    finish_reason = "tool_calls" if calls and generation.finish_reason == "stop" else generation.finish_reason
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}


def _completion_choice(generation: Generation) -> Result:
    return {"index": 0, "text": generation.text, "logprobs": None, "finish_reason": generation.finish_reason}


def _usage(generation: Generation) -> Result:
    num_tokens = len(generation.token_ids)
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": generation.num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def _figures(generation: Generation) -> Result:
    """What the server says in the same place."""
    return {
        "cluster": generation.cluster,
        "label": generation.cluster_label,
        "distance": generation.distance,
        "familiar": generation.familiar,
        "fallback": generation.fallback,
        "mode": generation.mode,
        "path": [step.cluster for step in generation.path],
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        "tokens_per_second": generation.decode_tokens_per_second,
    }


OPENAI = Form(read=_read, answer=_answer, refusal=_refusal)
"""{"custom_id", "method", "url", "body"} becomes {"id", "custom_id", "response", "error"}."""
