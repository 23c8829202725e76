"""Fewer bits for a weight: moments, rounding, packing."""
