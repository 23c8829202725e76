"""The bodies of Ollama's interface.

As everywhere: a field does what it says, or may only have values that change nothing, or is the machine's own business
here (how many threads, where to compute), which is said. All else is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .fields import Fields, NoItems, NoText, Plain, Text
from .tool_fields import ToolIn

__all__ = ["OllamaChatRequest", "OllamaFields", "OllamaMessageIn", "OllamaOptions", "OllamaTextRequest", "ShowRequest"]

_MACHINE = "The server's own business: taken, and without effect."


class MachineOptions(Fields):
    """How a model is run, which the server was told at its start."""

    num_ctx: int | None = Field(default=None, description=_MACHINE)
    num_batch: int | None = Field(default=None, description=_MACHINE)
    num_gpu: int | None = Field(default=None, description=_MACHINE)
    main_gpu: int | None = Field(default=None, description=_MACHINE)
    num_thread: int | None = Field(default=None, description=_MACHINE)
    num_keep: int | None = Field(default=None, description="Nothing is shifted out of the context.")
    numa: bool | None = Field(default=None, description=_MACHINE)
    low_vram: bool | None = Field(default=None, description=_MACHINE)
    use_mmap: bool | None = Field(default=None, description=_MACHINE)
    use_mlock: bool | None = Field(default=None, description=_MACHINE)


class OllamaOptions(MachineOptions):
    """How an answer is drawn. What is left out is as at Ollama, but for repeat_penalty, which is 1."""

    num_predict: int | None = Field(
        default=None, ge=-2, description="Maximum number of tokens; 0 and below for as many as there may be."
    )
    seed: int | None = Field(default=None, lt=1 << 63, description="The same seed gives the same answer; below 0 none.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0.8 if left out; 0 decodes greedily.")
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31, description="40 if left out.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="0.9 if left out.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, ge=0.1, le=10, description="Of the whole text, prompt included.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    typical_p: Literal[1] | None = None
    tfs_z: Literal[1] | None = None
    mirostat: Literal[0] | None = None
    penalize_newline: Literal[True] | None = None


class OllamaFields(Fields):
    """What chat and generate have in common."""

    model: Text = Field(description="A name out of /api/tags; ':latest' may follow it.")
    stream: bool | None = Field(default=None, description="Lines of JSON as they come, unless false.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(
        default=None, description="'json', or a JSON schema that the answer follows."
    )
    options: OllamaOptions | None = None
    keep_alive: str | float | None = Field(default=None, description="Models stay loaded as long as the server runs.")
    think: Literal[False] | None = None

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        """The JSON schema for the runtime; None for free text."""
        if self.format == "json":
            return {"type": "object"}
        return self.format if isinstance(self.format, dict) else None


class OllamaFunctionCall(Fields):
    """What was called."""

    name: Text
    arguments: dict[str, Any]
    index: int | None = None


class OllamaCall(Fields):
    """A call that an assistant made before."""

    id: Plain | None = None
    type: Literal["function"] | None = None
    function: OllamaFunctionCall


class OllamaMessageIn(Fields):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Plain | None = None
    images: NoItems | None = None
    thinking: NoText | None = None
    tool_calls: list[OllamaCall] | None = Field(default=None, description="Only of assistants.")
    tool_name: Plain | None = Field(default=None, description="Which function a message of role tool answers.")

    @model_validator(mode="after")
    def _check_role(self) -> "OllamaMessageIn":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only of role assistant")
        if self.tool_name is not None and self.role != "tool":
            raise ValueError("tool_name: only of role tool")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: expected text, got nothing")
        return self


class OllamaChatRequest(OllamaFields):
    """The body of /api/chat."""

    messages: Annotated[list[OllamaMessageIn], Field(min_length=1)]
    tools: list[ToolIn] | None = None


class OllamaTextRequest(OllamaFields):
    """The body of /api/generate."""

    prompt: Text = Field(description="What a user says, or with raw a text to continue.")
    system: Plain | None = None
    raw: bool | None = Field(default=None, description="Continue the prompt as it is.")
    suffix: NoText | None = None
    template: NoText | None = None
    images: NoItems | None = None
    context: NoItems | None = Field(default=None, description="Use /api/chat; beginnings that are alike are kept here.")

    @model_validator(mode="after")
    def _check_raw(self) -> "OllamaTextRequest":
        if self.raw and self.system:
            raise ValueError("raw, system: a raw prompt has no system message; give one of the two")
        return self


class ShowRequest(Fields):
    """The body of /api/show."""

    model: Text
    verbose: bool | None = Field(default=None, description="Without effect.")
