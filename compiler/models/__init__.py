"""Where models come from, and how they are loaded: completely or not at all."""

__all__: list[str] = []
