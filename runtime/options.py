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
    """What can ask a generation to end, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether the generation shall end."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingParams):
    """How a prompt is answered; `Engine.stream` and `Engine.generate` take the same as keywords.

    The options of sampling are those of `SamplingParams`.

    Attributes:
        max_new_tokens: decode at most so many tokens.
        stop: texts that end the generation, also the names of control tokens; they are not part of it.
        skip_special_tokens: leave control tokens out of the text; the one that ends it never is part of it.
        raw: continue a text as it is, without the chat template; names of control tokens in it are control tokens.
        parse_special: read them so in messages too, where they are text otherwise.
        continue_final_message: go on with the last message rather than begin an answer; None to do so where it is the
            assistant's.
        chat_template_kwargs: variables for the chat template, such as {"enable_thinking": False}.
        mode: how FFN weights are chosen; None for the engine's own.
        tools: JSON schemas of functions that the model may call, as OpenAI has them: {"type": "function", "function":
            {"name", "description", "parameters"}}. Where the chat template takes none, a system message says them.
        tool_choice: "auto"; "none" for no tools; "required" for one call of any of them; {"type": "function",
            "function": {"name": NAME}} for a call of that one. A call that is asked for follows its function's schema
            to the letter, which needs the package llguidance.
        drift_tokens: route the recent text again after so many decoded tokens; 0 keeps the pack.
        logprobs: give each token's log-probability, and so many of the likeliest tokens with theirs; None for neither.
        whole_length: refuse a prompt after which `max_new_tokens` have no room in what the model can read, instead of
            ending earlier.
        json_schema: a JSON schema, or its text, that the answer must follow; needs the package llguidance.
        on_token: called with each token before it is given out.
        cancel: ends the generation with the token during which it is set; while it waits, and between
            two blocks of a prompt, by `GenerationCancelled`.
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
        """The tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in ("auto", "none")

    def _flags(self) -> Iterator[tuple[str, object]]:
        for name in ("skip_special_tokens", "raw", "parse_special", "continue_final_message"):
            value = getattr(self, name)
            if name != "continue_final_message" or value is not None:
                yield name, value


class GenerationKeywords(TypedDict, total=False):
    """The same as keywords, for type checkers."""

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
    return [f"chat_template_kwargs: {name} is not for the taking; it is an argument of its own" for name in reserved]


DEFAULTS = GenerationOptions()
