"""Who does a compile's work: this process alone, or several that each hold the model."""

__all__: list[str] = []
