"""Which neurons stay in each cluster and layer, and how the loss of the others is repaired."""

__all__: list[str] = []
