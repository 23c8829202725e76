"""Checkpoints that are quantized already: their weights as plain numbers."""

__all__: list[str] = []
