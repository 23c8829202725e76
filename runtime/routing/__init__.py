"""From a prompt to its cluster and to the FFN weights that decode it."""

__all__: list[str] = []
