"""From messages to token ids: chat templates, tokenizers, tool calls."""
