"""Models in GGUF files: every key and tensor accounted for, or refused by name."""

__all__: list[str] = []
