"""The requests that the server takes: what may be in them, checked and described in /openapi.json.

A field of OpenAI's interface that is missing here is refused by name, and a field that is here does what it says, or
may only have the value that changes nothing. Nothing is ignored.
"""

from typing import Annotated, Any, Literal

from coreinfer.runtime import Mode
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = ["ChatRequest", "CompletionRequest", "MessageIn", "PlaceRequest", "SamplingFields", "StreamOptions"]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_MAX_TOP_LOGPROBS = 20

Zero = Annotated[float, Field(ge=0, le=0, description="Only 0, which changes nothing.")]
One = Annotated[int, Field(ge=1, le=1, description="Only 1, which changes nothing.")]


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can write it, but no tokenizer reads it.
        raise ValueError("expected Unicode text, got half a character") from error
    return text


Plain = Annotated[str, AfterValidator(_check_unicode)]
Text = Annotated[Plain, Field(min_length=1)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = _STRICT

    include_usage: bool | None = Field(default=None, description="Send usage figures in a last chunk of their own.")


class SamplingFields(BaseModel):
    """What chat and completions have in common."""

    model_config = _STRICT

    model: Text = Field(description="A name out of /v1/models.")
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of the answer.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="1 if left out; 0 decodes greedily.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63, description="The same seed gives the same answer.")
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = Field(
        default=None, description="Texts that end the answer and are not part of it."
    )
    stream: bool | None = Field(default=None, description="Answer by server-sent events.")
    stream_options: StreamOptions | None = None
    n: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0, description="Only empty.")] | None = None
    user: Plain | None = Field(default=None, description="Any text; kept nowhere, and without effect, as at OpenAI.")
    mode: Mode | None = Field(default=None, description="How FFN weights are chosen. Not in OpenAI's interface.")
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31, description="0 is off. Not in OpenAI's interface.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="0 is off. Not in OpenAI's interface.")
    repetition_penalty: float | None = Field(
        default=None, ge=0.1, le=10, description="1 is off. Not in OpenAI's interface."
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream true")
        return self


class TextPart(BaseModel):
    """A piece of a message; text is all that these models read."""

    model_config = _STRICT

    type: Literal["text"]
    text: Plain


class MessageIn(BaseModel):
    """A message of a conversation."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is read as system.")
    content: Plain | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def plain(self) -> dict[str, str]:
        """The message as the runtime takes it; pieces of text are joined by line breaks."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class JsonSchemaFormat(BaseModel):
    """A JSON schema that the answer follows."""

    model_config = _STRICT

    name: Annotated[Plain, Field(min_length=1, max_length=64)]
    # Under another name, because pydantic's models have a method `schema`.
    json_schema: dict[str, Any] = Field(alias="schema")
    description: Plain | None = None
    strict: bool | None = Field(default=None, description="The schema is always followed to the letter.")


class ResponseFormat(BaseModel):
    """What form the answer has."""

    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: it goes with type json_schema, and that with it")
        return self

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema for the runtime; None for free text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.json_schema


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[MessageIn], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens, max_completion_tokens: give one of the two")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to give; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)] = Field(
        description="A text to continue as it is, or a list of one."
    )
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP_LOGPROBS)
    best_of: One | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[Plain, Field(max_length=0, description="Only empty.")] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class PlaceRequest(BaseModel):
    """The body of /coreinfer/place."""

    model_config = _STRICT

    model: Text = Field(description="A name out of /v1/models.")
    text: Text = Field(description="What would be said: the place of a conversation is that of its last user message.")
