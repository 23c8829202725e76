"""Calibration text: read from files, or written by the model itself."""
