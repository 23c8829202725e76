"""Token shares: which inputs of a layer's matrices a decoded token can do without."""

__all__: list[str] = []
