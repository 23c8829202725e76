"""The two forms of a batch's lines: from a line to a request, and from its answer to a line."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime.generation import Generation
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.prompts.prompt_format import PromptFormat
from coreinfer.runtime.prompts.requests import Prompt

__all__ = ["OWN", "Answered", "Asked", "Form", "Result", "Value", "with_token_ids"]

Value = Mapping[str, Any]
Result = dict[str, Any]

_NOT_JSON = ("on_token", "cancel")
_OPTIONS = tuple(field.name for field in fields(GenerationOptions) if field.name not in _NOT_JSON)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a line asks for."""

    prompt: Prompt
    options: GenerationOptions


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A line's answer, and what its form may say of it.

    Attributes:
        line_id: the line's.
        digest: of the line, by which it is known again.
        value: what the line said.
        model: a name for the bundle.
        prompts: of the engine, which read calls of tools.
    """

    line_id: str | int
    digest: str
    value: Value
    asked: Asked
    generation: Generation
    model: str
    prompts: PromptFormat


@dataclass(frozen=True, kw_only=True)
class Form:
    """How lines of one kind are read and answered.

    Attributes:
        read: returns the request of a line, with the command's options; raises ConfigError.
        answer: returns the line for an answer.
        refusal: returns the line (id, digest, error) for a request that could not be answered.
    """

    read: Callable[[Value, GenerationOptions], Asked]
    answer: Callable[[Answered], Result]
    refusal: Callable[[str | int, str, Exception], Result]


def with_token_ids(bias: object) -> object:
    """Give `logit_bias` the numbers that JSON can only write as strings; other values stay as they are."""
    if not isinstance(bias, Mapping):
        return bias
    if wrong := [name for name in bias if not (name.isascii() and name.isdecimal() and len(name) < 10)]:
        raise ConfigError(f"logit_bias: expected ids of tokens, got {wrong[0]!r}")
    return {int(name): value for name, value in bias.items()}


def _read_own(value: Value, defaults: GenerationOptions) -> Asked:
    given = {name: item for name, item in value.items() if name not in ("id", "prompt", "messages")}
    if unknown := [name for name in given if name not in _OPTIONS]:
        raise ConfigError(f"{', '.join(unknown)}: not known here; expected {', '.join(_OPTIONS)}")
    if "logit_bias" in given:
        given["logit_bias"] = with_token_ids(given["logit_bias"])
    return Asked(prompt=_own_prompt(value), options=replace(defaults, **given))


def _own_prompt(value: Value) -> Prompt:
    kinds: dict[str, type] = {"prompt": str, "messages": list}
    given = [name for name in kinds if value.get(name) is not None]
    if len(given) != 1:
        raise ConfigError(f"prompt, messages: expected one of them, got {'both' if given else 'neither'}")
    prompt: Prompt = value[given[0]]
    if not isinstance(prompt, kinds[given[0]]):
        raise ConfigError(f"{given[0]}: expected a {kinds[given[0]].__name__}, got {type(prompt).__name__}")
    return prompt


def _own_answer(answered: Answered) -> Result:
    generation = answered.generation
    return {
        "id": answered.line_id,
        "request": answered.digest,
        **asdict(generation),
        "num_tokens": len(generation.token_ids),
    }


def _own_refusal(line_id: str | int, digest: str, error: Exception) -> Result:
    return {"id": line_id, "request": digest, "error": " ".join(str(error).split())}


OWN = Form(read=_read_own, answer=_own_answer, refusal=_own_refusal)
"""{"prompt" or "messages", "id", any generation option} becomes {"id", "request", the fields of `Generation`}."""
