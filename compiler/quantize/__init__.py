"""Fewer bits for a weight: moments, rounding, packing."""

__all__: list[str] = []
