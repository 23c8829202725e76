"""What clients get: tokens in OpenAI's form, whole or as events."""

__all__: list[str] = []
