"""What the fields of requests have in common.

A field of OpenAI's interface that is not known here is refused by name, unless it is null, which is the same as leaving
it out. A field that is known does what it says, or may only have values that change nothing. Nothing is ignored.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = ["Fields", "Name", "NoItems", "NoText", "Nothing", "Plain", "Text"]


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can write it, but no tokenizer reads it.
        raise ValueError("expected Unicode text, got half a character") from error
    return text


Plain = Annotated[str, AfterValidator(_check_unicode)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_check_unicode)]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Nothing = Annotated[dict[str, Any], Field(max_length=0, description="Only empty.")]
NoItems = Annotated[list[Any], Field(max_length=0, description="Only empty.")]
NoText = Annotated[Plain, Field(max_length=0, description="Only empty.")]


class Fields(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        """Take null for fields that are not known: clients write out what their own interface has."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if value is not None or name in known}
