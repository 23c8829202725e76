"""Functions that a model may call: how models write calls, and how calls are read out of their texts.

A chat template that takes tools was written for a model with a form of its own, which is told by what the template
itself writes for calls of earlier turns. Models without one are asked for plain JSON (tool_prompts.py).
"""

import json
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from coreinfer.bundles.errors import ConfigError

__all__ = ["FORMATS", "PLAIN", "CallReader", "ToolCall", "ToolFormat", "check_tool_choice", "named_tool", "tool_names"]

ToolChoice = str | Mapping[str, Any]

# Mistral's templates refuse ids of another form; nobody else minds.
_ID_LENGTH = 9
_ID_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that a model wrote.

    Attributes:
        id: id that the function's result refers to.
        name: name of the function.
        arguments: a JSON object, as text.
    """

    id: str
    name: str
    arguments: str

    @property
    def message_part(self) -> dict[str, Any]:
        """The call as an item of the key "tool_calls" of an assistant's message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a model writes calls: JSON objects with a name and arguments, and what is around them.

    Attributes:
        mark: what begins a call, or a list of calls; empty where nothing does.
        begin, end: the text before and after a call, as the model was trained to write it.
        arguments: the key of the arguments.
        is_list: whether calls are items of a JSON list.
        hints: any of these texts in a chat template says that its model writes calls so.
        others: none of these may be in it: the same mark with something else than JSON in it.
    """

    mark: str = ""
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    is_list: bool = False
    hints: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def writes_like(self, template: str) -> bool:
        """Whether a chat template writes calls in this format."""
        return any(hint in template for hint in self.hints) and not any(other in template for other in self.others)


PLAIN = ToolFormat()
"""A call is an answer that is nothing but JSON."""
_HERMES = ToolFormat(
    mark="<tool_call>",
    begin="<tool_call>\n",
    end="\n</tool_call>",
    hints=("<tool_call>",),
    others=("<function=", "<arg_key>"),
)
_MISTRAL = ToolFormat(
    mark="[TOOL_CALLS]", begin="[TOOL_CALLS]", is_list=True, hints=("[TOOL_CALLS]",), others=("[ARGS]", "[CALL_ID]")
)
_LLAMA = ToolFormat(mark="<|python_tag|>", arguments="parameters", hints=("<|python_tag|>", '"parameters": '))
FORMATS = (_HERMES, _MISTRAL, _LLAMA)
"""The first that a chat template writes like is its model's."""


class CallReader:
    """Splits one answer, as it comes, into content and calls.

    All content, joined, is the text without its calls. A call that is incomplete, is not JSON, or names a function
    that was not offered stays content, as it was written.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, one_call: bool = False) -> None:
        """Begin an answer.

        Args:
            form: how the model writes calls.
            names: of the functions that it may call.
            one_call: drop all calls after the first.
        """
        self.calls: list[ToolCall] = []
        self._form, self._names, self._one_call = form, frozenset(names), one_call
        self._end = form.end.strip()
        self._held = ""
        self._opened: str | None = None  # what began the call that is being read
        self._at_start = True

    def push(self, text: str) -> str:
        """Take the next piece of the answer.

        Returns:
            The content that has become certain.
        """
        self._held += text
        content = ""
        while (piece := self._next_piece()) is not None:
            content += piece
        return content

    def finish(self) -> str:
        """End the answer.

        Returns:
            The rest of the content.
        """
        rest, opened, self._held, self._opened = self._held, self._opened, "", None
        if opened is None:
            return rest
        return "" if self._take(rest) else opened + rest

    def _next_piece(self) -> str | None:
        """Take one step; None when more text is needed for the next."""
        if self._opened is not None:
            return self._end_of_call() if self._opened and self._end else None
        if self._at_start:
            stripped, mark = self._held.lstrip(), self._form.mark
            if self.calls:
                # Between calls, and after the last, line breaks are no content.
                self._held = stripped
            if stripped != mark and mark.startswith(stripped):
                return None
            if stripped[:1] in ("{", "[") and not (mark and stripped.startswith(mark)):
                # The mark can be a special token, which is not in the text.
                self._opened = ""
                return None
            self._at_start = not stripped
        return self._up_to_mark() if self._held and not self._at_start else None

    def _up_to_mark(self) -> str | None:
        mark = self._form.mark
        start = self._held.find(mark) if mark else -1
        if start >= 0:
            self._opened, rest = mark, self._held[start + len(mark) :]
        else:
            start = len(self._held) - _num_begun(self._held, mark)
            rest = self._held[start:]
        content, self._held = self._held[:start], rest
        return content if content or self._opened is not None else None

    def _end_of_call(self) -> str | None:
        end = self._held.find(self._end)
        if end < 0:
            return None
        body, self._held = self._held[:end], self._held[end + len(self._end) :]
        opened, self._opened = self._opened or "", None
        if not self._take(body):
            return opened + body + self._end
        self._at_start = True
        return ""

    def _take(self, body: str) -> bool:
        calls = _parse_calls(body, self._names)
        if not calls:
            return False
        self.calls += calls
        if self._one_call:
            del self.calls[1:]
        return True


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of functions.

    Raises:
        ConfigError: one has none, or these are no functions.
    """
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"tools: expected a list of JSON schemas, got {tools!r:.80}")
    functions = [tool.get("function", tool) for tool in tools]
    names: list[Any] = [function.get("name") if isinstance(function, Mapping) else None for function in functions]
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise ConfigError(f"tools[{index}].function.name: expected a string that is not empty, got {name!r}")
    return names


def check_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Check whether and what a model must call.

    Args:
        choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.
    Raises:
        ConfigError: it is none of these, or there is no such tool.
    """
    if choice in ("auto", "none"):
        return
    name = named_tool(choice)
    if choice != "required" and name is None:
        expected = 'auto, none, required or {"type": "function", "function": {"name": ...}}'
        raise ConfigError(f"tool_choice: expected {expected}, got {choice!r}")
    if not tools:
        raise ConfigError("tool_choice: it requires a call, but there are no tools; give tools or leave it out")
    names = tool_names(tools)
    if name is not None and name not in names:
        raise ConfigError(f"tool_choice: expected one of {', '.join(names)}, got {name!r}")


def named_tool(choice: object) -> str | None:
    """Return the name of the one function that must be called; None where it is not named."""
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        return None
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _parse_calls(body: str, names: Collection[str]) -> list[ToolCall]:
    """Read calls: JSON objects or lists of them, one after another; none where anything else is between them."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    calls: list[ToolCall] = []
    rest = body.strip()
    try:
        while rest:
            value, end = decoder.raw_decode(rest)
            for item in value if isinstance(value, list) else [value]:
                calls.append(_call(item, names))
            rest = rest[end:].lstrip(" \n\r\t;,")
    except (ValueError, RecursionError):
        return []
    return calls


def _call(item: object, names: Collection[str]) -> ToolCall:
    if not isinstance(item, dict) or item.get("name") not in names:
        raise ValueError("not a call of a function that was offered")
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return ToolCall(id=_new_id(), name=item["name"], arguments=json.dumps(arguments, ensure_ascii=False))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _new_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def _num_begun(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that a mark could begin with."""
    return next((length for length in range(min(len(text), len(mark)), 0, -1) if mark.startswith(text[-length:])), 0)
