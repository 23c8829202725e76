"""tools/compare_answers.py: what it takes for rounding, and what not."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .programs import load_program


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("tools/compare_answers.py")


def answer(ids: Sequence[int], *, cluster: int = 0, second: tuple[int, float] = (9, -1.05)) -> dict[str, Any]:
    """An answer whose every token has the log-probability -1, with one other token beside it."""
    named = [[{"token_id": token, "logprob": -1.0}, {"token_id": second[0], "logprob": second[1]}] for token in ids]
    shared = {"id": "a", "text": "", "cluster": cluster}
    return {**shared, "token_ids": list(ids), "logprobs": [-1.0] * len(ids), "top_logprobs": named}


def test_equal_answers_are_good(program: ModuleType) -> None:
    compared = program.compare(answer([1, 2, 3]), answer([1, 2, 3]))
    assert compared.good
    assert compared.text == "same 3 tokens"


@pytest.mark.parametrize(
    ("second", "good", "text"),
    [
        ((9, -1.45), True, "parts after 1 of 3 tokens, by 0.4500 nats"),
        ((9, -1.6), False, "parts after 1 of 3 tokens, by 0.6000 nats"),
        ((8, -1.05), False, "parts after 1 of 3 tokens, by inf nats"),
    ],
)
def test_texts_may_part_at_a_near_tie_only(
    program: ModuleType, second: tuple[int, float], good: bool, text: str
) -> None:
    compared = program.compare(answer([1, 2, 3], second=second), answer([1, 9, 3]))
    assert (compared.good, compared.text) == (good, text)


@pytest.mark.parametrize(("ours", "theirs"), [([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 9])])
def test_a_text_that_ends_elsewhere_is_no_rounding(program: ModuleType, ours: list[int], theirs: list[int]) -> None:
    assert not program.compare(answer(ours), answer(theirs)).good


def test_an_answer_without_logprobs_is_refused(program: ModuleType) -> None:
    with pytest.raises(ValueError, match="line a: expected an answer with logprobs, got"):
        program.compare(answer([1]), {"id": "a", "error": "no room"})


def test_another_cluster_is_not_good(program: ModuleType) -> None:
    compared = program.compare(answer([1]), answer([1], cluster=1))
    assert not compared.good
    assert compared.text == "same 1 tokens, another cluster"


def test_files_are_compared_by_id(program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, got, others = (tmp_path / name for name in ("expected", "got", "others"))
    lines = [{**answer([1, 2]), "id": 1}, {**answer([3, 4]), "id": 2}]
    expected.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    got.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)), encoding="utf-8")
    others.write_text(json.dumps(lines[0]) + "\n", encoding="utf-8")
    assert program.main([str(expected), str(got)]) == 0
    assert capsys.readouterr().out.endswith("2 of 2 texts are the same to the letter\n")
    assert program.main([str(expected), str(others)]) == 1
    assert capsys.readouterr().err == "error: expected answers 1, 2, got 1\n"
