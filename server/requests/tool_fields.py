"""Functions that a client offers, and whether one must be called."""

from typing import Any, Literal

from pydantic import Field

from .fields import Fields, Name, Plain

__all__ = ["NamedChoice", "ToolIn"]


class FunctionIn(Fields):
    """A function that the model may call."""

    name: Name
    description: Plain | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments.")
    strict: bool | None = Field(
        default=None,
        description="A call that tool_choice requires follows the schema exactly; one of the model's own accord "
        "is as the model writes it.",
    )


class ToolIn(Fields):
    """A tool; functions are all that there are."""

    type: Literal["function"]
    function: FunctionIn

    @property
    def plain(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedFunction(Fields):
    """Which function it is."""

    name: Name


class NamedChoice(Fields):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction
