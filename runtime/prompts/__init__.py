"""From messages to token ids: chat templates, tokenizers, tool calls."""

__all__: list[str] = []
