"""Triton's interpreter, which runs kernels on the CPU."""

import importlib.util
import os

import pytest

__all__ = ["INTERPRETED", "needs_interpreter"]

INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs Triton, and TRITON_INTERPRET=1 as make test sets it"
)
