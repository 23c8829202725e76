"""Scores with intervals: observations of items, summed and resampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Evaluation", "Ratio", "Variant", "MetricScore", "interval", "ratio_score"]

NUM_RESAMPLES = 1000
TAILS = (2.5, 97.5)

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model.

    Attributes:
        subject: the bundle or the other program's model.
        mode: how FFN weights are chosen.
        bytes_per_token: weights that a decoded token reads, whole head included; None where unknown.
    """

    subject: str
    mode: str
    bytes_per_token: int | None

    @property
    def name(self) -> str:
        """Subject and mode in one."""
        return f"{self.subject}: {self.mode}" if self.mode else self.subject


@dataclass(frozen=True, kw_only=True)
class MetricScore:
    """A metric of one row on one data set, with the bootstrap's 95% interval (percentiles; Efron 1979)."""

    row: str
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    num_items: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One item's share of a metric that is a ratio of sums, such as KL a token."""

    numerator: float
    denominator: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All rows and scores.

    Attributes:
        reference: the model that KL is measured against.
        num_skipped: data set -> items left out because their context is under 2 tokens or longer than fits.
        seconds: data set -> time that it took.
    """

    reference: str
    rows: list[Variant] = field(default_factory=list)
    scores: list[MetricScore] = field(default_factory=list)
    num_skipped: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def ratio_score(row: str, dataset: str, metric: str, shares: Sequence[Ratio], *, seed: int = 0) -> MetricScore:
    """Sum up items; a metric that ends in "perplexity" is the exponential of the ratio."""
    numerators = np.array([share.numerator for share in shares], dtype=np.float64)
    denominators = np.array([share.denominator for share in shares], dtype=np.float64)
    value, low, high = interval(numerators, denominators, seed=seed)
    if metric == "perplexity":
        value, low, high = (float(np.exp(min(bound, 50.0))) for bound in (value, low, high))
    return MetricScore(row=row, dataset=dataset, metric=metric, value=value, low=low, high=high, num_items=len(shares))


def interval(numerators: Values, denominators: Values, *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of sums, and the 2.5 and 97.5 percentiles of 1,000 resamples of the items.

    The same seed draws the same items for every row, so rows differ by what they are, not by the draw.

    Args:
        numerators, denominators: (items,).
    """
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(numerators), size=(NUM_RESAMPLES, len(numerators)))
    ratios = numerators[picks].sum(axis=1) / np.maximum(denominators[picks].sum(axis=1), 1e-30)
    low, high = np.percentile(ratios, TAILS)
    return float(numerators.sum() / max(denominators.sum(), 1e-30)), float(low), float(high)
