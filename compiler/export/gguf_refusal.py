"""Refusals of models that a GGUF file cannot state, or that llama.cpp computes otherwise."""

from coreinfer.bundles import UnsupportedModelError

__all__ = ["refusal"]


def refusal(reason: str) -> UnsupportedModelError:
    """Say why a model is not written as GGUF."""
    return UnsupportedModelError(f"--to gguf: {reason}")
