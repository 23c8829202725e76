"""Which neurons stay in each cluster and layer, and how the others are made up for."""

__all__: list[str] = []
