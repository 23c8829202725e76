"""Calibration text by meaning: embeddings, clusters, and the router that finds them again."""

__all__: list[str] = []
