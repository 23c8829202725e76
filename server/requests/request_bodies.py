"""The bodies that the server takes: what may be in them, checked and described in /openapi.json."""

from typing import Annotated, Any, Literal

from coreinfer.bundles.shared.option_fields import help_of
from coreinfer.runtime import GenerationOptions, Mode
from coreinfer.runtime.generation import PromptFfn
from pydantic import Field, model_validator

from .fields import Fields, NoText, Nothing, Plain, Text
from .messages import MessageIn
from .tool_fields import NamedChoice, ToolIn

__all__ = ["ChatRequest", "CompletionRequest", "PlaceRequest", "SamplingFields", "StreamOptions"]

_MAX_TOP_LOGPROBS = 20
_MAX_CHOICES = 128

TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _ours(name: str) -> str:
    """Describe a field that OpenAI's interface does not have, as the option of a generation describes itself."""
    return f"{help_of(GenerationOptions, name)} Not in OpenAI's interface."


class StreamOptions(Fields):
    """How an answer is streamed."""

    include_usage: bool | None = Field(default=None, description="Send usage figures in a last chunk of their own.")
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Fields):
    """What chat and completions have in common."""

    model: Text = Field(description="A name out of /v1/models.")
    max_tokens: int | None = Field(default=None, ge=1, description="Maximum number of tokens of the answer.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="1 if left out; 0 decodes greedily.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63, description="The same seed gives the same answer.")
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = Field(
        default=None, description="Texts that end the answer and are not part of it."
    )
    stream: bool | None = Field(default=None, description="Answer by server-sent events.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(
        default=None, ge=1, le=_MAX_CHOICES, description="Answers; with a seed, each has the next one."
    )
    frequency_penalty: Penalty | None = Field(default=None, description="For each time a token was decoded.")
    presence_penalty: Penalty | None = Field(default=None, description="For tokens that were decoded.")
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, description="Added to the logits of token ids.")
    user: Plain | None = Field(default=None, description="Any text; kept nowhere, and without effect, as at OpenAI.")
    mode: Mode | None = Field(default=None, description=_ours("mode"))
    token_share: float | None = Field(default=None, gt=0, le=1, description=_ours("token_share"))
    prompt_ffn: PromptFfn | None = Field(default=None, description=_ours("prompt_ffn"))
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31, description=_ours("top_k"))
    min_p: float | None = Field(default=None, ge=0, le=1, description=_ours("min_p"))
    repetition_penalty: float | None = Field(default=None, ge=0.1, le=10, description=_ours("repetition_penalty"))
    skip_special_tokens: bool | None = Field(
        default=None, description=f"True if left out. {_ours('skip_special_tokens')}"
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingFields":
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options: include_usage only with stream true")
        return self

    @property
    def num_choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1


class JsonSchemaFormat(Fields):
    """A JSON schema that the answer follows."""

    name: Annotated[Plain, Field(min_length=1, max_length=64)]
    # Under another name, because pydantic's models have a method `schema`.
    json_schema: dict[str, Any] = Field(alias="schema")
    description: Plain | None = None
    strict: bool | None = Field(default=None, description="The schema is always followed exactly.")


class ResponseFormat(Fields):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected exactly with type json_schema")
        return self

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema for the runtime; None for free text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.json_schema


class UnusedFields(Fields):
    """Fields of OpenAI's chat that change nothing here, with the values for which this is right."""

    store: Literal[False] | None = Field(default=None, description="Nothing is kept.")
    metadata: dict[Text, Any] | None = Field(default=None, description="For what is kept, which is nothing.")
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Plain | None = Field(default=None, description="As user.")
    prompt_cache_key: Plain | None = Field(default=None, description="Prompts are compared themselves.")
    prompt_cache_retention: Literal["in_memory"] | None = None
    prompt_cache_options: Nothing | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: Literal["none"] | None = None
    functions: Annotated[list[Any], Field(max_length=0, description="Only empty; tools are the newer form.")] | None = (
        None
    )
    function_call: Literal["none", "auto"] | None = None


class TemplateFields(Fields):
    """How a conversation is written for the model; not in OpenAI's API."""

    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description=_ours("chat_template_kwargs"))
    continue_final_message: bool | None = Field(default=None, description=_ours("continue_final_message"))
    add_generation_prompt: bool | None = Field(
        default=None, description="False only together with continue_final_message."
    )
    parse_special: bool | None = Field(default=None, description=_ours("parse_special"))

    @model_validator(mode="after")
    def _check_end(self) -> "TemplateFields":
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise ValueError("add_generation_prompt: expected the contrary of continue_final_message")
        return self


class ChatRequest(SamplingFields, UnusedFields, TemplateFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[MessageIn], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)
    tools: list[ToolIn] | None = Field(default=None, description=help_of(GenerationOptions, "tools"))
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="If false, calls after the first are dropped.")

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens, max_completion_tokens: give one of the two")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def plain_choice(self) -> str | dict[str, Any]:
        """What the runtime takes as tool_choice."""
        choice = self.tool_choice or "auto"
        return choice if isinstance(choice, str) else choice.model_dump()


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=_MAX_CHOICES)] = Field(
        description="A text to continue as it is, or several."
    )
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, description="Only the same as n.")
    echo: bool | None = Field(default=None, description="Begin the answer with the prompt; not with logprobs.")
    suffix: NoText | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of: expected the same as n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo, logprobs: a prompt's log-probabilities are not computed; give one of the two")
        return self

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class PlaceRequest(Fields):
    """The body of /coreinfer/place."""

    model: Text = Field(description="A name out of /v1/models.")
    text: Text = Field(description="What would be said: the place of a conversation is that of its last user message.")
