"""From a bundle to an ordinary model: one cluster's pack, or the dense model, as other programs load it."""

__all__: list[str] = []
