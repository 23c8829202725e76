"""Required calls: a grammar of the functions' schemas, in the model's own form of calls."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime.prompts.tools import ToolFormat, named_tool, tool_names
from tokenizers import Tokenizer

__all__ = ["call_grammar"]

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python writes JSON, and with it the chat templates that models learnt calls from."""


def call_grammar(form: ToolFormat, tools: Sequence[Mapping[str, Any]], choice: object, tokenizer: Tokenizer) -> str:
    """Write a grammar for one call, in llguidance's form of Lark.

    Args:
        form: how the model writes calls.
        tools: as in `GenerationOptions`.
        choice: "required" for any of them, or what names one.
        tokenizer: whose tokens are to be taken where they stand for a mark.
    Raises:
        ConfigError: a tool has no name, or no schema for parameters.
    """
    wanted = named_tool(choice)
    names = tool_names(tools)
    chosen = [tool for tool, name in zip(tools, names, strict=True) if wanted in (None, name)]
    schema = _calls_schema(chosen, form)
    around = [_literal(text, tokenizer) for text in (form.begin, form.end)]
    return f"start: {around[0]} call {around[1]}\ncall: %json {json.dumps(schema)}"


def _calls_schema(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for number, (tool, name) in enumerate(zip(tools, tool_names(tools), strict=True)):
        # Of two functions with one name each keeps its own parameters.
        key = f"parameters{number}"
        definitions[key] = _moved(_parameters(tool, name), f"#/$defs/{key}")
        properties = {"name": {"const": name}, form.arguments: {"$ref": f"#/$defs/{key}"}}
        calls.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    outer = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if form.is_list else call
    return {**outer, "$defs": definitions, "x-guidance": _SPACING}


def _parameters(tool: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    parameters = tool.get("function", tool).get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"tools: parameters of {name}: expected a JSON schema, got {str(parameters)[:40]!r}")
    # A call's arguments are an object, whatever else the schema leaves open.
    return {"type": "object", **parameters} if "$ref" not in parameters else parameters


def _moved(schema: Any, root: str) -> Any:
    """Point references to the schema's own root to the place where it is put."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """Write a text in Lark; where the tokenizer has added tokens for its parts, as those tokens."""
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    present = sorted((content for content in added if content and content in text), key=len, reverse=True)
    if not text:
        return ""
    parts = re.split("(" + "|".join(map(re.escape, present)) + ")", text) if present else [text]
    return " ".join(f"<[{added[part]}]>" if part in added else json.dumps(part) for part in parts if part)
