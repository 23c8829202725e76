"""Metrics and intervals, against values worked out by hand or by torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.evaluation.answer_metrics import entity_f1, exact_match, normalize, token_f1
from coreinfer.evaluation.corpus_scores import translation_scores
from coreinfer.evaluation.logits import diverge, greedy_ids, log_likelihood, predictions
from coreinfer.evaluation.scores import Evaluation, MetricScore, Ratio, Variant, interval, ratio_score
from coreinfer.evaluation.tables import dataset_table, mean_scores, summary_table


def test_answers_are_normalized_like_squad() -> None:
    assert normalize("The  Fjord-lake, of an Ox!") == "fjordlake of ox"


@pytest.mark.parametrize(
    ("answer", "match", "f1"),
    [("the Fjord", 1.0, 1.0), ("fjord and more", 1.0, 0.5), ("a big fjord", 0.0, 2 / 3), ("", 0.0, 0.0)],
)
def test_match_and_f1(answer: str, match: float, f1: float) -> None:
    assert exact_match(answer, ["Fjord"]) == match
    assert token_f1(answer, ["Fjord", "lake"]) == pytest.approx(f1)


def test_a_number_is_not_matched_by_its_beginning() -> None:
    assert exact_match("201", ["20"]) == 0.0
    assert exact_match("20.", ["20"]) == 1.0
    assert exact_match("anything", ["the"]) == 0.0


def test_entities_count_whole_and_once() -> None:
    assert entity_f1("DJ Khaled (person); fouseytube (person)", ["fouseytube (person); DJ Khaled (person)"]) == 1.0
    assert entity_f1("DJ Khaled (place); fouseytube (person)", ["fouseytube (person); DJ Khaled (person)"]) == 0.5
    assert entity_f1("a (x); a (x); a (x)", ["a (x)"]) == 1.0
    assert entity_f1("", ["a (x)"]) == 0.0


def test_divergence_is_that_of_torch() -> None:
    generator = np.random.default_rng(0)
    reference, logits = generator.normal(size=(2, 7, 50)).astype(np.float32) * 3
    targets = generator.integers(0, 50, size=7)
    log_p, log_q = torch.tensor(reference).log_softmax(-1), torch.tensor(logits).log_softmax(-1)
    found = diverge(predictions(reference), logits, targets.tolist())
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.nll, -log_q[range(7), targets], rtol=1e-5)
    assert found.agrees.tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    assert log_likelihood(logits, targets.tolist())[0] == pytest.approx(float(log_q[range(7), targets].sum()), rel=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32) * 10
    best = logits.argmax(axis=1).tolist()
    found = diverge(predictions(logits), logits, best)
    assert found.kl.max() < 1e-5
    assert found.kl.min() >= 0
    assert found.agrees.all()
    assert log_likelihood(logits, best)[1]
    assert not log_likelihood(logits, [best[0], (best[1] + 1) % 40, *best[2:]])[1]


def test_greedy_decoding_stops() -> None:
    def count_up(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        logits = np.zeros((1, 10), dtype=np.float32)
        logits[0, ids[-1] + 1] = 1
        return logits

    def run(**options: Any) -> list[int]:
        arguments: dict[str, Any] = {"max_new_tokens": 5, "eos_ids": {9}, "stopped": lambda _ids: False} | options
        return greedy_ids(count_up, 2, **arguments)

    assert run() == [3, 4, 5, 6, 7]
    assert run(eos_ids={5}) == [3, 4]
    assert run(stopped=lambda ids: ids[-1:] == [4]) == [3, 4]


def test_an_interval_covers_what_it_should() -> None:
    """Of 200 samples with a known mean about 95% of the intervals must hold it."""
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        values = generator.exponential(size=60)
        _, low, high = interval(values, np.ones(60))
        hits += low <= 1.0 <= high
    assert 175 <= hits <= 199


def test_a_ratio_weighs_items_by_their_tokens() -> None:
    shares = [Ratio(numerator=1.0, denominator=1), Ratio(numerator=0.0, denominator=9)]
    score = ratio_score("row", "data", "KL", shares)
    assert score.value == pytest.approx(0.1)
    assert (score.low, score.high) == (0.0, 1.0)
    assert ratio_score("row", "data", "perplexity", shares).value == pytest.approx(np.exp(0.1))
    assert ratio_score("row", "data", "KL", shares) == score


def test_translations() -> None:
    lines = ["the cat sat on the mat today", "a dog ran over the hill at noon", "we went home after the rain fell"]
    bleu, chrf = translation_scores("row", "data", lines, lines)
    assert bleu.value == pytest.approx(100)
    assert chrf.value == pytest.approx(100)
    worse = [lines[0], "nothing of the kind", "we went home"]
    bleu, chrf = translation_scores("row", "data", worse, lines)
    assert 0 < bleu.value < 60
    assert bleu.low < bleu.value < bleu.high
    (alone, _) = translation_scores("row", "data", lines[:1], lines[:1])
    assert alone.low == pytest.approx(100)
    assert alone.high == pytest.approx(100)


def test_tables() -> None:
    def score(row: str, dataset: str, metric: str, value: float) -> MetricScore:
        return MetricScore(
            row=row, dataset=dataset, metric=metric, value=value, low=value / 2, high=value * 2, num_items=7
        )

    rows = [
        Variant(subject="a", mode="dense", bytes_per_token=93_100_000),
        Variant(subject="b", mode="", bytes_per_token=None),
    ]
    scores = [
        score("a: dense", "lm_x", "KL", 0.25),
        score("b", "lm_x", "KL", 12.0),
        score("a: dense", "lm_y", "KL", 0.75),
        score("a: dense", "mc_z", "accuracy", 0.5),
    ]
    result = Evaluation(reference="m: original", rows=rows, scores=scores)
    assert mean_scores(result)["a: dense"] == {"KL": 0.5, "accuracy": 0.5}
    summary = list(summary_table(result))
    assert summary[0].endswith("against m: original")
    assert "| a: dense | 93.1 | 0.500 | 0.500 |" in summary
    assert "| b |  | 12.0 |  |" in summary
    lines = list(dataset_table("lm_x", rows, scores[:2]))
    assert lines[0] == "### lm_x, 7 items"
    assert "| a: dense | 0.250 [0.125, 0.500] |" in lines
    assert "| b | 12.0 [6.000, 24.0] |" in lines
