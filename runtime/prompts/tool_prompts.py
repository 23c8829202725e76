"""Tools, calls and their results in the messages that a chat template gets."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coreinfer.bundles.errors import ConfigError

__all__ = ["call_problems", "described", "for_template"]

Messages = list[dict[str, Any]]

_INSTRUCTIONS = """You can call these functions, one JSON schema a line:
{schemas}

To call one, answer with nothing but a JSON object: {{"name": "NAME", "arguments": {{...}}}}. \
To call several, answer with nothing but a list of such objects. If no function helps, answer in plain text."""


def call_problems(where: str, message: Mapping[str, Any]) -> list[str]:
    """List what is wrong with the calls in a message; see `for_template` for their form."""
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return [f"{where}.tool_calls: expected a list, got {type(calls).__name__}"]
    return [problem for index, call in enumerate(calls) for problem in _problems(f"{where}.tool_calls[{index}]", call)]


def _problems(where: str, call: object) -> list[str]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return [f'{where}: expected {{"function": {{"name", "arguments"}}}}, got {str(call)[:40]!r}']
    try:
        arguments = _arguments(function)
    except ValueError as error:
        return [f"{where}.function.arguments: expected a JSON object, got other text: {error}"]
    if not isinstance(arguments, dict):
        return [f"{where}.function.arguments: expected a JSON object, got {type(arguments).__name__}"]
    return []


def for_template(messages: Messages) -> Messages:
    """Bring calls and results into the form that chat templates expect.

    Args:
        messages: with calls as OpenAI has them: {"id", "type", "function": {"name", "arguments"}}, the arguments an
            object or its JSON text.
    Returns:
        Copies, in which arguments are objects, content is text, a result has its function's name, and there is no
        empty list of calls.
    """
    names: dict[Any, str] = {}
    changed = []
    for message in messages:
        copy = dict(message)
        if calls := copy.pop("tool_calls", None):
            copy["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}} for call in calls
            ]
            names |= {call.get("id"): call["function"]["name"] for call in calls}
        if copy.get("content") is None:
            copy["content"] = ""
        if copy["role"] == "tool" and copy.get("name") is None and copy.get("tool_call_id") in names:
            copy["name"] = names[copy["tool_call_id"]]
        changed.append(copy)
    return changed


def described(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> Messages:
    """Describe tools, calls and results in plain messages, for a chat template that takes no tools.

    Args:
        messages: of `for_template`.
        tools: put into the system message, which is made if there is none.
    Returns:
        Messages in which calls are their JSON text, and results are messages of the user, joined with the
        user's next message: many templates expect users and assistants to take turns.
    """
    plain: Messages = []
    for message in messages:
        said = _said(message)
        if plain and said["role"] == "user" and plain[-1].get("is_result"):
            said["content"] = f"{plain.pop()['content']}\n\n{said['content']}"
        plain.append(said)
    plain = [{key: value for key, value in message.items() if key != "is_result"} for message in plain]
    if not tools:
        return plain
    text = _INSTRUCTIONS.format(schemas="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _said(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool" and "tool_call_id" in message:
        return {
            "role": "user",
            "content": f"Result of {message.get('name', 'the function')}: {message['content']}",
            "is_result": True,
        }
    if calls := message.get("tool_calls"):
        written = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
        text = json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)
        content = f"{message['content']}\n{text}" if message["content"] else text
        return {"role": message["role"], "content": content}
    return dict(message)


def _arguments(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        return arguments
    try:
        # Some servers write no arguments as an empty text.
        return json.loads(arguments) if arguments.strip() else {}
    except RecursionError as error:
        raise ConfigError("messages: arguments of a call are nested too deeply") from error
