"""The form of what the server answers to clients of Ollama, described in /openapi.json."""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

__all__ = [
    "Details",
    "OllamaCallOut",
    "OllamaChat",
    "OllamaFunctionOut",
    "OllamaMessage",
    "OllamaText",
    "Shown",
    "Tag",
    "Tags",
    "Version",
    "utc_text",
]


def utc_text(moment: datetime) -> str:
    """Write a moment, given in UTC, as Ollama does."""
    return moment.isoformat().replace("+00:00", "Z")


class OllamaFunctionOut(BaseModel):
    """What is called."""

    name: str
    arguments: dict[str, Any]


class OllamaCallOut(BaseModel):
    """A call of a function."""

    function: OllamaFunctionOut


class WithoutNulls(BaseModel):
    """An object that leaves out what it does not say."""

    @model_serializer(mode="wrap")
    def _leave_out_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class OllamaMessage(WithoutNulls):
    """The assistant's message, or what a line adds to it."""

    role: Literal["assistant"] = "assistant"
    content: str
    tool_calls: list[OllamaCallOut] | None = None


class OllamaAnswer(WithoutNulls):
    """What all lines have; the last says how the answer ended and what it took, in nanoseconds."""

    model: str
    created_at: str = Field(default_factory=lambda: utc_text(datetime.now(UTC)))
    done: bool
    done_reason: Literal["stop", "length"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChat(OllamaAnswer):
    """The answer of /api/chat, or a line of it."""

    message: OllamaMessage


class OllamaText(OllamaAnswer):
    """The answer of /api/generate, or a line of it."""

    response: str


class Details(BaseModel):
    """What a model is."""

    format: str = "coreinfer"
    family: str
    families: list[str]
    parent_model: str
    parameter_size: str = ""
    quantization_level: str


class Tag(BaseModel):
    """A bundle that is served."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(BaseModel):
    """The answer of /api/tags and /api/ps."""

    models: list[Tag]


class Shown(BaseModel):
    """The answer of /api/show."""

    modelfile: str = ""
    parameters: str = ""
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(BaseModel):
    """The answer of /api/version."""

    version: str
