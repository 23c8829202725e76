"""tools/compare_logits.py: where bits part."""

from types import ModuleType

import numpy as np
import pytest

from .programs import load_program


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("tools/compare_logits.py")


def test_where_bits_part_is_said(program: ModuleType) -> None:
    logits = np.zeros((3, 4), dtype=np.float32)
    calls = program.Calls(name="a", cluster=1, prompt_ids=(5, 6), decoded_ids=(7, 8), logits=logits)
    assert calls.line == "1 2 5 6 2 7 8"
    assert program.compare(calls, logits.copy()) is None
    other = logits.copy()
    other[1:, 2] = 0.25
    assert program.compare(calls, other) == "2 of 3 calls differ, call 1 first, by 0.25 at most"
    # Zeros of unlike signs are equal numbers.
    assert program.compare(calls, -logits) == "3 of 3 calls differ, call 0 first, by 0 at most"
