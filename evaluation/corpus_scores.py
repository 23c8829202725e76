"""Scores of a whole corpus of translations, by sacrebleu."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .scores import NUM_RESAMPLES, TAILS, MetricScore

__all__ = ["translation_scores"]


def translation_scores(
    row: str, dataset: str, answers: Sequence[str], expected: Sequence[str], *, seed: int = 0
) -> list[MetricScore]:
    """BLEU and chrF (arXiv 1804.08771; chrF2, Popović 2015), 0 to 100, with 95% intervals over resampled sentences."""
    # Its import takes a while, which other tasks need not wait for.
    from sacrebleu.metrics import BLEU, CHRF

    scores = []
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        low, high = _interval(metric, answers, expected, seed)
        value = float(metric.corpus_score(list(answers), [list(expected)]).score)
        scores.append(
            MetricScore(row=row, dataset=dataset, metric=name, value=value, low=low, high=high, num_items=len(answers))
        )
    return scores


def _interval(metric: Any, answers: Sequence[str], expected: Sequence[str], seed: int) -> tuple[float, float]:
    """Percentiles of scores from resampled sums of each sentence's counts.

    sacrebleu's own `n_bootstrap` fails where a resample scores 0 (2.6: its sums mix floats and numpy's).
    """
    counts = np.array(metric._extract_corpus_statistics(list(answers), [list(expected)]))
    picks = np.random.default_rng(seed).integers(0, len(counts), size=(NUM_RESAMPLES, len(counts)))
    values = [float(metric._compute_score_from_stats(counts[pick].sum(axis=0).tolist()).score) for pick in picks]
    low, high = np.percentile(values, TAILS)
    return float(low), float(high)
