"""From a conversation to the text of a prompt, by the model's own chat template.

A template comes out of a model's files and is a program: it runs in jinja2's sandbox, with the helpers that
transformers gives to templates.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from coreinfer.bundles.errors import ConfigError, join_problems
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .tool_prompts import call_problems, described, for_template

__all__ = ["check_messages", "render_chat", "routing_text", "takes_tools"]


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Write a conversation as the model was trained to read it.

    Args:
        template: a Hugging Face chat template, in jinja2's language.
        messages: as `check_messages` expects them; other keys reach the template too, if JSON can hold their values.
        special_tokens: the tokens that the template may name, such as `bos_token`, with their text.
        tools: JSON schemas of functions that the model may call. For a template that takes none they are described in
            the system message, and calls and results are written as plain messages.
        variables: others that the template knows, such as `enable_thinking`.
        add_generation_prompt: end with what introduces the assistant's answer.
        continue_final_message: end with the last message's own text, which is to be continued; nothing introduces an
            answer then.
    Returns:
        The prompt's text. It holds its special tokens, so none must be added when it is tokenized.
    Raises:
        ConfigError: the messages, the tools or the variables are malformed, or the template is, or it refuses them or
            leaves them out.
    """
    check_messages(messages)
    if tools:
        _check_tools(tools)
    _check_variables(template, variables or {})
    turns, offered = for_template(_plain("messages", messages)), _plain("tools", tools) if tools else None
    if _names_calls(turns, offered) and not takes_tools(template):
        turns, offered = described(turns, offered or []), None
    values: dict[str, Any] = {
        **special_tokens,
        "documents": None,
        **_plain("chat_template_kwargs", [variables or {}])[0],
        "messages": turns,
        "add_generation_prompt": add_generation_prompt and not continue_final_message,
        # Templates ask `tools is none`, which is false of a name that is not there.
        "tools": offered,
    }
    text = _up_to_last(template, values) if continue_final_message else _render(template, values)
    _check_left_out(template, values)
    return text


def _render(template: str, values: Mapping[str, Any]) -> str:
    try:
        return _compiled(template).render(values)
    except Exception as error:  # A template is a program: it can raise anything, a division by zero for one.
        raise ConfigError(f"chat template: {_reason(error)}") from error


def _up_to_last(template: str, values: Mapping[str, Any]) -> str:
    """Render up to the end of the last message's text.

    Raises:
        ConfigError: the template leaves that message out.
    """
    mark, messages = _mark(), values["messages"]
    # These blanks, which no template writes, tell whether it cuts blanks off at the end of a message.
    blanks = " \n \n"
    last = {**messages[-1], "content": f"{messages[-1]['content'] or ''}{mark}{blanks}"}
    text, found, after = _render(template, {**values, "messages": [*messages[:-1], last]}).rpartition(mark)
    if not found:
        raise ConfigError(
            f"messages[{len(messages) - 1}]: this model's chat template leaves the last message out, so that it cannot "
            "be continued; set continue_final_message to False"
        )
    return text if after.startswith(blanks) else text.rstrip()


def _mark() -> str:
    # Digits: no filter of a template changes them.
    return str(secrets.randbelow(9 * 10**23) + 10**23)


def takes_tools(template: str) -> bool:
    """Whether a chat template writes the tools that it is given.

    Raises:
        ConfigError: it is no template.
    """
    return "tools" in _names(template)


def _check_tools(tools: object) -> None:
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"tools: expected a list of JSON schemas, got {_short(tools)}")


def _names_calls(messages: Sequence[Mapping[str, Any]], tools: object) -> bool:
    return bool(tools) or any("tool_calls" in message or "tool_call_id" in message for message in messages)


def _check_variables(template: str, variables: Mapping[str, Any]) -> None:
    if unknown := sorted(variables.keys() - _names(template)) if variables else []:
        raise ConfigError(
            f"chat_template_kwargs: this model's chat template knows no {', '.join(unknown)}; leave it out"
        )


def _check_left_out(template: str, values: Mapping[str, Any]) -> None:
    """Refuse a template that leaves a message out without a word, such as one that knows no system message.

    What a user or the assistant said may go: thoughts and turns of long ago.
    """
    messages = values["messages"]
    checked = {
        index: _mark()
        for index, message in enumerate(messages)
        if message["role"] not in ("user", "assistant") and message["content"].strip()
    }
    if not checked:
        return
    marked = [
        {**message, "content": f"{message['content']} {checked[index]}"} if index in checked else message
        for index, message in enumerate(messages)
    ]
    text = _render(template, {**values, "messages": marked})
    for index, mark in checked.items():
        if mark not in text and not _depends_on(template, values, index):
            raise ConfigError(
                f"messages[{index}]: this model's chat template leaves {messages[index]['role']} messages out; put it "
                "into a user message"
            )


def _depends_on(template: str, values: Mapping[str, Any], index: int) -> bool:
    """Whether the text is another one where a message says something else."""
    messages = list(values["messages"])
    messages[index] = {**messages[index], "content": _mark()}
    return _render(template, values) != _render(template, {**values, "messages": messages})


def check_messages(messages: object) -> None:
    """Check the form of a conversation; which roles there are and in which order is the template's affair.

    Args:
        messages: expected to be a non-empty list of mappings with the strings "role" and "content"; content may be None
            or missing where there are "tool_calls".
    Raises:
        ConfigError: naming all that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ConfigError(f"messages: expected a list, got {_short(messages)}")
    if not messages:
        raise ConfigError("messages: expected at least one message, got an empty list")
    if problems := [text for index, message in enumerate(messages) for text in _message_problems(index, message)]:
        raise ConfigError(join_problems(problems))


def routing_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Give the text that says what a conversation is about: the user's last message, or the last of all."""
    by_user = [message for message in messages if message["role"] == "user"]
    return (by_user or messages)[-1].get("content") or ""


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's tokens for training; here it is just a scope."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """What templates know as `dict`, without the attributes of a class."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """What templates know as `namespace`, without a way to set Python's internals."""

    def __init__(*args: Any, **named: Any) -> None:
        # Without a parameter called self, as in jinja2's own: a template may name an attribute so.
        namespace, *items = args
        attributes = dict(*items, **named)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(namespace, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"access to attribute {name!r} of a namespace is unsafe")


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """Compile a template, some 10 ms for a long one; what it sets while it renders is gone with the rendering."""
    return _environment().from_string(template)


@lru_cache(maxsize=8)
def _names(template: str) -> frozenset[str]:
    """Names that a template takes from outside."""
    try:
        return frozenset(find_undeclared_variables(_environment().parse(template)))
    except TemplateError as error:
        raise ConfigError(f"chat template: {_reason(error)}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain(name: str, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages as plain data: the sandbox cannot know what the methods of other objects do."""
    try:
        return [json.loads(json.dumps(dict(item))) for item in items]
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: expected values that JSON can hold, got another: {error}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}"


def _message_problems(index: int, message: object) -> list[str]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        return [f"{where}: expected an object with role and content, got {_short(message)}"]
    keys = ["role"] if message.get("tool_calls") and message.get("content") is None else ["role", "content"]
    missing = [key for key in keys if key not in message]
    wrong = [key for key in keys if key in message and not isinstance(message[key], str)]
    return (
        [f"{where}.{key}: expected a string, got nothing" for key in missing]
        + [f"{where}.{key}: expected a string, got {_short(message[key])}" for key in wrong]
        + call_problems(where, message)
    )


def _short(value: object) -> str:
    return f"{type(value).__name__} {' '.join(str(value).split())[:40]!r}"
