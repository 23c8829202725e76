"""Messages of a conversation, as clients send them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .fields import Fields, Name, NoItems, Plain

__all__ = ["MessageIn"]


class TextPart(Fields):
    """A piece of a message; text is all that these models read."""

    type: Literal["text"]
    text: Plain


class FunctionCall(Fields):
    """What was called."""

    name: Name
    arguments: Plain = Field(description="A JSON object, as text.")


class CallIn(Fields):
    """A call that an assistant made before."""

    id: Plain
    type: Literal["function"]
    function: FunctionCall


class MessageIn(Fields):
    """A message of a conversation; an assistant's message as it was answered is one, too."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is read as system."
    )
    content: Plain | Annotated[list[TextPart], Field(min_length=1)] | None = Field(
        default=None, description="May only be missing where there are tool_calls."
    )
    name: Plain | None = Field(default=None, description="For the chat template.")
    tool_calls: list[CallIn] | None = Field(default=None, description="Only of assistants.")
    tool_call_id: Plain | None = Field(default=None, description="Which call a message of role tool answers.")
    annotations: NoItems | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "MessageIn":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only of role assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: expected exactly on messages of role tool")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: expected text or a list of text parts, got nothing")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The message as the runtime takes it; pieces of text are joined by line breaks."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self._text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message

    @property
    def _text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)
