"""Scores of a whole corpus of translations, by sacrebleu."""

from collections.abc import Sequence

from .scores import NUM_RESAMPLES, Score

__all__ = ["translation_scores"]


def translation_scores(row: str, dataset: str, answers: Sequence[str], expected: Sequence[str]) -> list[Score]:
    """BLEU and chrF (WMT 2018's BLEU, arXiv 1804.08771; chrF2, Popović 2015), 0 to 100, with 95% intervals."""
    # Its import takes a while, which other tasks need not wait for.
    from sacrebleu.metrics import BLEU, CHRF

    scores = []
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        # sacrebleu resamples sentences' sufficient statistics; below two sentences there is nothing to resample.
        resamples = NUM_RESAMPLES if len(answers) > 1 else 1
        found = metric.corpus_score(list(answers), [list(expected)], n_bootstrap=resamples)
        mean, half_width = (found._mean, found._ci) if resamples > 1 else (found.score, 0.0)
        scores.append(
            Score(
                row=row,
                dataset=dataset,
                metric=name,
                value=float(found.score),
                low=max(0.0, float(mean - half_width)),
                high=min(100.0, float(mean + half_width)),
                num_items=len(answers),
            )
        )
    return scores
