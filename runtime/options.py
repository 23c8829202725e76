"""The options of one generation."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.checks import ANY, Check, one_of, raise_problems, share, whole_number
from coreinfer.bundles.shared.option_fields import keyword, option

from .decoding.sampling import SamplingParams
from .decoding.text import stop_problems
from .generation import Mode, PromptFfn, Token
from .prompts.tools import check_tool_choice

__all__ = ["DEFAULTS", "Cancel", "GenerationKeywords", "GenerationOptions", "check_choice"]


class Cancel(Protocol):
    """A signal that ends a generation, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether the generation should end."""


_FUNCTION = Check(expected="a function", holds=callable)
_EVENT = Check(
    expected="an object with the method is_set", holds=lambda value: callable(getattr(value, "is_set", None))
)


def _variable_problems(name: str, variables: object) -> Iterator[str]:
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        yield f"{name}: expected an object with names, got {variables!r}"
        return
    for reserved in ("messages", "tools", "add_generation_prompt"):
        if reserved in variables:
            yield f"{name}: {reserved} is reserved; it is an argument of its own"


def _read_variables(text: str) -> Mapping[str, Any]:
    """Read what --chat-template-kwargs gives; `_variable_problems` says what JSON may hold."""
    try:
        found: Mapping[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs: expected a JSON object, got other text: {error}") from error
    return found


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingParams):
    """How a prompt is answered; `Engine.stream` and `Engine.generate` take the same as keywords.

    The options of sampling are those of `SamplingParams`. Each option is stated once: `coreinfer-run`, docs/cli.md, the
    checks and what the server says of its own fields are made from these.
    """

    max_new_tokens: int = field(
        default=256,
        metadata=option(
            "Maximum number of tokens to decode.", check=whole_number(1), switches=("-n", "--max-new-tokens")
        ),
    )
    stop: Sequence[str] = field(
        default=(), metadata=option("End the answer at this text; repeatable.", problems=stop_problems, unset="none")
    )
    """Also the name of a control token; the text that ends the generation is not part of it."""
    skip_special_tokens: bool = field(
        default=True,
        metadata=option(
            "Leave control tokens out of the text.",
            switches=("--show-special",),
            switch_help="Show control tokens in the text.",
        ),
    )
    """The one that ends the text never is part of it."""
    raw: bool = field(
        default=False,
        metadata=option("Continue the prompt as it is, without the chat template.", switches=("--raw",)),
    )
    """Names of control tokens in it are control tokens."""
    parse_special: bool = field(
        default=False,
        metadata=option("Read names of control tokens in messages as control tokens.", switches=("--parse-special",)),
    )
    """They are text otherwise."""
    continue_final_message: bool | None = field(
        default=None,
        metadata=keyword("Go on with the last message; if left out, with one of the assistant."),
    )
    chat_template_kwargs: Mapping[str, Any] | None = field(
        default=None,
        metadata=option(
            "Variables for the chat template, as a JSON object.",
            problems=_variable_problems,
            unset="none",
            parse=_read_variables,
        ),
    )
    """Such as {"enable_thinking": False}."""
    mode: Mode | None = field(
        default=None, metadata=keyword("How FFN weights are chosen.", unset="the engine's own mode")
    )
    token_share: float | None = field(
        default=None,
        metadata=option(
            "What share of the layers' weights a decoded token reads, by its own inputs; 1 for all.",
            check=share(),
            unset="the bundle's own",
        ),
    )
    """Of a bundle that was compiled with --token-share. Prompts are always read with all."""
    prompt_ffn: PromptFfn = field(
        default="dense",
        metadata=option("What reads the prompt: the dense FFN where the bundle has it, or the pack that decodes."),
    )
    """The pack costs quality (see `coreinfer-eval --mode pack-prompt`). It spares the dense FFN, which is read from
    disk for each 256 tokens of a prompt where it does not fit into memory. Not in modes in which the dense FFN decodes
    or verifies, or the prompt chooses its own neurons."""
    tools: Sequence[Mapping[str, Any]] | None = field(
        default=None, metadata=keyword("Functions that the model may call.", check=ANY)
    )
    """JSON schemas, as OpenAI has them: {"type": "function", "function": {"name", "description", "parameters"}}. Where
    the chat template takes none, a system message says them."""
    tool_choice: str | Mapping[str, Any] = field(
        default="auto",
        metadata=keyword(
            'Whether and what to call: "auto"; "none" for no tools; "required" for one call of any of them; {"type": '
            '"function", "function": {"name": NAME}} for a call of that one.',
            check=ANY,
        ),
    )
    """A call that is asked for follows its function's schema to the letter, which needs the package llguidance."""
    drift_tokens: int = field(
        default=64,
        metadata=keyword(
            "Route the recent text again each time this many tokens were decoded; 0 keeps the pack.",
            check=whole_number(0),
        ),
    )
    logprobs: int | None = field(
        default=None,
        metadata=keyword(
            "Return each token's log-probability, and this many of the likeliest tokens with theirs.",
            check=whole_number(0),
            unset="neither",
        ),
    )
    whole_length: bool = field(
        default=False,
        metadata=keyword(
            "Refuse a prompt after which max_new_tokens have no room in what the model can read, instead of ending "
            "earlier."
        ),
    )
    json_schema: Mapping[str, Any] | str | None = field(
        default=None,
        metadata=keyword(
            "A JSON schema, or its text, that the answer must follow; needs the package llguidance.", check=ANY
        ),
    )
    on_token: Callable[[Token], object] | None = field(
        default=None, metadata=keyword("Called with each token before it is returned.", check=_FUNCTION)
    )
    cancel: Cancel | None = field(
        default=None,
        metadata=keyword(
            "Ends the generation with the token during which it is set; between two blocks of a prompt by "
            "`GenerationCancelled`.",
            check=_EVENT,
        ),
    )

    def __post_init__(self) -> None:
        """Check every value but the schema and the tools, which their own libraries read.

        Raises:
            ConfigError: naming what is wrong.
        """
        super().__post_init__()
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
    token_share: float | None
    prompt_ffn: PromptFfn
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


DEFAULTS = GenerationOptions()
