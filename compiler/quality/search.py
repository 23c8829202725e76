"""From targets to options: the narrowest packs of a given quality, the smallest useful number of clusters."""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import Quality, Score
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import METHODS

__all__ = [
    "LEAST_TOKENS",
    "excess_of",
    "fewest_clusters",
    "fit_clusters",
    "fit_quality",
    "least_keeps",
    "rounding_problem",
    "searches",
    "too_little_text",
]

_log = logging.getLogger(__name__)
_NUM_TRIES = 6
_FINE = 0.015
_FIRST_TRY = 0.9
_LADDER = (1, 2, 4, 8, 16, 32, 64)
_CLUSTER_MARGIN = 0.02
_CLUSTER_DOCUMENTS = 8
"""Fewer documents a cluster on average are not worth a try."""

LEAST_TOKENS = 128
"""Of a cluster's held-out text: with fewer, the score of all clusters together stands for its own."""

Measure = Callable[[Sequence[float]], Quality]
"""Narrows each cluster at its keep ratio and scores the packs on held-out text."""
MeasureClusters = Callable[[int], Score]
"""Narrows with a number of clusters and scores their packs on held-out text."""


def fit_quality(
    config: CompileConfig,
    keep: float,
    measure: Measure,
    dense: Score | None,
    num_tokens: Sequence[int],
) -> tuple[float, tuple[float, ...]]:
    """Turn `max_kl` and `min_top1` into each cluster's lowest keep ratio that meets both; without them, into `keep`.

    What is measured are packs as they are stored, before any healing. A cluster with little held-out text is judged by
    all clusters' score.

    Args:
        dense: score of the dense FFN as it is stored, which loses what rounding costs; None without held-out text.
        num_tokens: (clusters,) held-out tokens that the router sends to each cluster and that are decoded narrow.
    Returns:
        The keep ratio that has as many bytes on held-out text, and one for each cluster.
    Raises:
        ConfigError: there is no held-out text to measure on, or rounding alone loses more than may be lost.
    """
    if not searches(config):
        return keep, (keep,) * len(num_tokens)
    if dense is None or not sum(num_tokens):
        raise ConfigError(f"--max-kl, --min-top1: {too_little_text()}, or --keep")

    if (dense_excess := excess_of(config, dense)) > 0:
        raise ConfigError(rounding_problem(config, dense))

    judged_by_all = {cluster for cluster, count in enumerate(num_tokens) if count < LEAST_TOKENS}

    def excesses(keeps: Sequence[float]) -> list[float]:
        quality = measure(keeps)
        scores = [quality.clusters] * len(keeps)
        for found in quality.per_cluster:
            if found.cluster not in judged_by_all:
                scores[found.cluster] = found.score
        for cluster, (keep, score) in enumerate(zip(keeps, scores, strict=True)):
            _log.info("cluster %d: keep %.3f, held-out KL %.4f, top-1 %.4f", cluster, keep, score.kl, score.top1)
        return [excess_of(config, score) for score in scores]

    least, method = max(config.min_layer_keep, 0.05), METHODS[config.effort]
    keeps = least_keeps(
        excesses,
        num_clusters=len(num_tokens),
        least=least,
        dense_excess=dense_excess,
        later=judged_by_all,
        tolerance=method.tolerance,
        num_tries=method.num_tries,
    )
    return round(float(np.average(keeps, weights=num_tokens)), 4), keeps


def too_little_text() -> str:
    """Say that nothing can be held out to measure on."""
    return "expected calibration text enough to hold some out, got too little; give more text"


def rounding_problem(config: CompileConfig, dense: Score) -> str:
    """Say that rounding alone loses more than may be lost."""
    by_default = config.max_kl is None and config.min_top1 is None
    asked = f"--max-kl {config.effective_max_kl:g}, the default" if by_default else "--max-kl, --min-top1"
    way_out = f"give {'a share' if config.searches_share else '--keep'}" if by_default else "ask for less"
    if config.quantize != "bf16":
        way_out += ", or --quantize more bits"
    return (
        f"{asked}: rounding to {config.quantize} alone costs KL {dense.kl:.4f} and leaves top-1 "
        f"{dense.top1:.4f} on held-out text, before anything is narrowed; {way_out}"
    )


def searches(config: CompileConfig) -> bool:
    """Whether keep ratios are found by a quality to aim at."""
    return config.aims_at_quality and not config.searches_share


def excess_of(config: CompileConfig, score: Score) -> float:
    """Return what is lost against what may be lost: 0 where it is just that, -1 for the dense model."""
    limits = []
    if (max_kl := config.effective_max_kl) is not None:
        limits.append(score.kl / max_kl - 1)
    if config.min_top1 is not None:
        # A model that must agree everywhere loses beyond measure where it does not.
        limits.append((1 - score.top1) / max(1 - config.min_top1, 1e-6) - 1)
    return max(limits)


def least_keeps(
    excesses: Callable[[Sequence[float]], Sequence[float]],
    *,
    num_clusters: int,
    least: float,
    dense_excess: float = -1.0,
    later: Collection[int] = (),
    tolerance: float = 0.05,
    num_tries: int = _NUM_TRIES,
    first_try: float = _FIRST_TRY,
    power: float = 1.5,
    fine: float = _FINE,
) -> tuple[float, ...]:
    """Find each cluster's lowest keep ratio that holds, for all clusters at once.

    Args:
        excesses: tells of a ratio for each cluster how much more the cluster loses than it may, from -1 (nothing is
            lost) on; at most 0 holds. Is asked `num_tries` times at most.
        least: the lowest ratio to try.
        dense_excess: that of ratio 1, the dense model, which holds.
        later: clusters whose excess depends on the others' ratios: they take the mean of these until these are found.
        tolerance: share of the limit that may be left.
        first_try: the ratio that is tried first.
        power: as which power of what goes the loss grows.
        fine: ratios that are nearer to each other are as good.
    Returns:
        Ratios that meet the limit: each leaves no more of it than the tolerance, or is at most `fine` above one that
        does not meet it, unless the tries ended before.
    """
    brackets = [
        _Bracket(low=least, high_excess=dense_excess, tolerance=tolerance, first_try=first_try, power=power, fine=fine)
        for _ in range(num_clusters)
    ]
    first = [cluster for cluster in range(num_clusters) if cluster not in later]
    for _ in range(num_tries):
        keeps = [bracket.high if bracket.done else bracket.middle for bracket in brackets]
        waits = any(not brackets[cluster].done for cluster in first)
        if waits:
            mean = round(float(np.mean([keeps[cluster] for cluster in first])), 4)
            keeps = [mean if cluster in later else keep for cluster, keep in enumerate(keeps)]
        for cluster, (keep, found) in enumerate(zip(keeps, excesses(keeps), strict=True)):
            if not brackets[cluster].done and not (waits and cluster in later):
                brackets[cluster].narrow(keep, found)
        if all(bracket.done for bracket in brackets):
            break
    return tuple(bracket.high for bracket in brackets)


@dataclass(kw_only=True)
class _Bracket:
    """False position with the Illinois rule. Loss falls with the ratio, near 1 in about a straight line: few tries do.

    Attributes:
        low, high: ratios of which the lower does not hold, or was not tried, and the higher holds.
        low_excess, high_excess: what they lose too much.
        tolerance: how far below the limit is good enough.
        held: whether the last try held; None before the first.
        first_try, power, fine: of `least_keeps`.
        done: whether the higher is good enough.
    """

    low: float
    tolerance: float
    first_try: float
    power: float
    fine: float
    low_excess: float = math.inf
    high: float = 1.0
    high_excess: float = -1.0
    held: bool | None = None
    done: bool = field(default=False, init=False)

    @property
    def middle(self) -> float:
        """Where a straight line would have no excess, but not next to an end; what is likely before a line is known.

        What is lost grows about as the power 3/2 of the share of neurons that go (`power`).
        """
        if math.isfinite(self.low_excess):
            share = self.low_excess / (self.low_excess - self.high_excess)
            return round(self.low + (self.high - self.low) * min(max(share, 0.1), 0.9), 4)
        if self.held is None:
            return max(self.first_try, (self.low + self.high) / 2)
        lost = max(1 + self.high_excess, 1e-3)
        wanted = 1 - (1 - self.high) * float(lost ** (-1 / self.power))
        return round(min(max(wanted, self.low + 0.1 * (self.high - self.low)), self.high - self.fine), 4)

    def narrow(self, keep: float, excess: float) -> None:
        """Take in what a ratio in between loses too much."""
        # An end that stays twice is made to look nearer, or the other would creep.
        if excess > 0:
            self.high_excess *= 0.5 if self.held is False else 1
            self.low, self.low_excess, self.held = keep, excess, False
        else:
            self.low_excess *= 0.5 if self.held is True else 1
            self.high, self.high_excess, self.held = keep, excess, True
        self.done = -self.tolerance <= excess <= 0 or self.high - self.low <= self.fine


def fit_clusters(config: CompileConfig, measure: MeasureClusters, *, num_documents: int) -> int | Literal["auto"]:
    """Turn clusters "auto" into the fewest whose held-out KL is within 2% of the best tried, all at the same bytes.

    With a quality to aim at, numbers of clusters are compared at the options' keep ratio.

    Args:
        num_documents: to calibrate on; 0 where nothing is held out, and clusters are counted by their embeddings alone.
    """
    if config.clusters != "auto":
        return config.clusters
    if not num_documents:
        _log.warning("--clusters auto: no text is held out to measure KL on; counting clusters by their embeddings")
        return config.clusters
    ladder = [count for count in _LADDER if count == 1 or count * _CLUSTER_DOCUMENTS <= num_documents]
    return fewest_clusters(lambda count: measure(count).kl, ladder)


def fewest_clusters(kl_of: Callable[[int], float], ladder: Sequence[int]) -> int:
    """Climb until two counts in a row bring no new best by the margin; return the fewest within the margin of the best.

    Args:
        kl_of: held-out KL of a number of clusters.
        ladder: counts to try, ascending.
    """
    tried: dict[int, float] = {}
    best, num_idle = float("inf"), 0
    for count in ladder:
        tried[count] = kl_of(count)
        _log.info("%d clusters: held-out KL %.4f", count, tried[count])
        num_idle = 0 if tried[count] < best * (1 - _CLUSTER_MARGIN) else num_idle + 1
        best = min(best, tried[count])
        if num_idle == 2:
            break
    fewest = min(count for count, kl in tried.items() if kl <= best * (1 + _CLUSTER_MARGIN))
    _log.info("clusters auto: %d asked for; empty and tiny ones are merged", fewest)
    return fewest
