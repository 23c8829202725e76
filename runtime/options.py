"""The options of one generation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.checks import instance_of, one_of, raise_problems, whole_number

from .decoding.sampling import SamplingParams
from .decoding.text import check_stop
from .generation import MODES, Mode, Token
from .prompts.tools import check_tool_choice

__all__ = ["DEFAULTS", "Cancel", "GenerationKeywords", "GenerationOptions", "check_choice"]


class Cancel(Protocol):
    """A signal that ends a generation, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether the generation should end."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingParams):
    """How a prompt is answered; `Engine.stream` and `Engine.generate` take the same as keywords.

    The options of sampling are those of `SamplingParams`.

    Attributes:
        max_new_tokens: maximum number of tokens to decode.
        stop: texts that end the generation, names of control tokens included; they are not part of the answer.
        skip_special_tokens: leave control tokens out of the text; the one that ends it is always left out.
        raw: continue a text as it is, without the chat template; names of control tokens in it are read as control
            tokens.
        parse_special: read names of control tokens as control tokens in messages too, where they are text by default.
        continue_final_message: continue the last message instead of beginning an answer; None to do so if it is the
            assistant's.
        chat_template_kwargs: variables for the chat template, such as {"enable_thinking": False}.
        mode: how FFN weights are chosen; None for the engine's own.
        tools: JSON schemas of functions that the model may call, as OpenAI has them: {"type": "function", "function":
            {"name", "description", "parameters"}}. If the chat template takes no tools, a system message describes
            them.
        tool_choice: "auto"; "none" for no tools; "required" for one call of any of them; {"type": "function",
            "function": {"name": NAME}} for a call of that one. A required call follows its function's schema exactly,
            which needs the package llguidance.
        drift_tokens: route the recent text again each time this many tokens were decoded; 0 keeps the pack.
        logprobs: return each token's log-probability, and this many of the likeliest tokens with theirs; None for
            neither.
        whole_length: refuse a prompt after which `max_new_tokens` do not fit into the model's context, instead of
            ending earlier.
        json_schema: a JSON schema, or its text, that the answer must follow; needs the package llguidance.
        on_token: called with each token before it is returned.
        cancel: when set, ends the generation after the token in progress; before its first token, while it waits or
            between two blocks of its prompt, raises `GenerationCancelled`.
    """

    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    raw: bool = False
    parse_special: bool = False
    continue_final_message: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    mode: Mode | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    drift_tokens: int = 64
    logprobs: int | None = None
    whole_length: bool = False
    json_schema: Mapping[str, Any] | str | None = None
    on_token: Callable[[Token], object] | None = None
    cancel: Cancel | None = None

    def __post_init__(self) -> None:
        """Check every value but the schema and the tools, which their own libraries read.

        Raises:
            ConfigError: naming what is wrong.
        """
        super().__post_init__()
        check_stop(self.stop)
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        whole = [("max_new_tokens", self.max_new_tokens, 1), ("drift_tokens", self.drift_tokens, 0)]
        whole += [("logprobs", self.logprobs, 0)] if self.logprobs is not None else []
        raise_problems(
            [
                *(whole_number(least).problem(name, value) for name, value, least in whole),
                *(instance_of(bool).problem(name, value) for name, value in self._flags()),
                *_variable_problems(self.chat_template_kwargs),
            ]
        )
        check_tool_choice(self.tool_choice, self.tools)
        if self.must_call and self.json_schema is not None:
            raise ConfigError("tool_choice, json_schema: a call has its function's schema; give one of the two")

    @property
    def offered_tools(self) -> Sequence[Mapping[str, Any]] | None:
        """The tools that the model is offered."""
        return None if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in ("auto", "none")

    def _flags(self) -> Iterator[tuple[str, object]]:
        for name in ("skip_special_tokens", "raw", "parse_special", "continue_final_message"):
            value = getattr(self, name)
            if name != "continue_final_message" or value is not None:
                yield name, value


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationOptions` as keywords, for type checkers."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    skip_special_tokens: bool
    raw: bool
    parse_special: bool
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    mode: Mode | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    drift_tokens: int
    logprobs: int | None
    whole_length: bool
    json_schema: Mapping[str, Any] | str | None
    on_token: Callable[[Token], object] | None
    cancel: Cancel | None


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed.

    Raises:
        ConfigError: it is not.
    """
    raise_problems([one_of(allowed).problem(name, value)])


def _variable_problems(variables: object) -> list[str]:
    if variables is None:
        return []
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        return [f"chat_template_kwargs: expected an object with names, got {variables!r}"]
    reserved = [name for name in ("messages", "tools", "add_generation_prompt") if name in variables]
    return [f"chat_template_kwargs: {name} is reserved; it is an argument of its own" for name in reserved]


DEFAULTS = GenerationOptions()
