"""Calibration text: read from files, or written by the model itself."""

__all__: list[str] = []
