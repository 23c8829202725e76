"""From what is wanted to options: the narrowest packs of a quality, the fewest clusters that earn their place."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import Score

from .config import CompileConfig

__all__ = ["fewest_clusters", "fit_clusters", "fit_quality", "least_keep"]

_log = logging.getLogger(__name__)
_NUM_TRIES = 6
_CLOSE = 0.05
_FINE = 0.015
_LADDER = (1, 2, 4, 8, 16, 32, 64)
_CLUSTER_MARGIN = 0.02
_CLUSTER_DOCUMENTS = 8
"""Fewer documents a cluster on average are not worth a try."""

Measure = Callable[[CompileConfig], Score]
"""Narrows with the options and scores the clusters' packs on held-out text."""


def fit_quality(config: CompileConfig, measure: Measure, *, has_held_out: bool) -> CompileConfig:
    """Turn `max_kl` and `min_top1` into the lowest keep ratio that holds both; without them nothing changes.

    What is measured are packs in bf16 before any healing: rounding adds its own KL (docs/benchmarks.md), healing takes
    some away.

    Raises:
        ConfigError: there is no held-out text to measure on.
    """
    if config.max_kl is None and config.min_top1 is None:
        return config
    if not has_held_out:
        raise ConfigError("--max-kl, --min-top1: expected calibration text enough to hold some out, got too little")

    def excess(keep: float) -> float:
        score = measure(replace(config, keep=keep))
        _log.info("keep %.3f: held-out KL %.4f, top-1 %.4f", keep, score.kl, score.top1)
        return _excess(config, score)

    return replace(config, keep=least_keep(excess, least=max(config.min_layer_keep, 0.05)))


def _excess(config: CompileConfig, score: Score) -> float:
    """What is lost against what may be lost: 0 where it is just that, -1 for the dense model."""
    limits = []
    if config.max_kl is not None:
        limits.append(score.kl / config.max_kl - 1)
    if config.min_top1 is not None:
        # A model that must agree everywhere loses beyond measure where it does not.
        limits.append((1 - score.top1) / max(1 - config.min_top1, 1e-6) - 1)
    return max(limits)


def least_keep(excess: Callable[[float], float], *, least: float, num_tries: int = _NUM_TRIES) -> float:
    """Find the lowest keep ratio that holds, by false position with the Illinois rule; loss falls with the ratio.

    Near 1 it falls about in a straight line, so that few tries do.

    Args:
        excess: tells of a ratio how much more is lost than may be, from -1 (nothing is lost) on; at most 0 holds. Is
            asked for `num_tries` ratios at most. Ratio 1, which is the dense model, holds without being asked.
        least: the lowest ratio to try.
    Returns:
        A ratio that holds: one that loses at least 95% of what it may, or is at most 0.015 above one that does not
        hold, unless the tries ended before.
    """
    low, high = least, 1.0
    low_excess, high_excess = math.inf, -1.0
    held: bool | None = None
    for _ in range(num_tries):
        keep = _between(low, low_excess, high, high_excess)
        found = excess(keep)
        # An end that stays twice is made to look nearer, or the other would creep.
        if found > 0:
            high_excess *= 0.5 if held is False else 1
            low, low_excess, held = keep, found, False
        else:
            low_excess *= 0.5 if held is True else 1
            high, high_excess, held = keep, found, True
        if -_CLOSE <= found <= 0 or high - low <= _FINE:
            break
    return high


def _between(low: float, low_excess: float, high: float, high_excess: float) -> float:
    """Where a straight line would have no excess, but not next to an end; halfway where the line is unknown."""
    share = low_excess / (low_excess - high_excess) if math.isfinite(low_excess) else 0.5
    return round(low + (high - low) * min(max(share, 0.1), 0.9), 4)


def fit_clusters(config: CompileConfig, measure: Measure, *, num_documents: int) -> CompileConfig:
    """Turn clusters "auto" into the fewest whose held-out KL is within 2% of the best tried, all at the same bytes.

    With a quality to aim at, numbers of clusters are compared at the options' keep ratio.

    Args:
        num_documents: to calibrate on; 0 where nothing is held out, and clusters are counted by their embeddings alone.
    """
    if config.clusters != "auto":
        return config
    if not num_documents:
        _log.warning("--clusters auto: no text is held out to measure KL on; counting clusters by their embeddings")
        return config
    ladder = [count for count in _LADDER if count == 1 or count * _CLUSTER_DOCUMENTS <= num_documents]
    return replace(config, clusters=fewest_clusters(lambda count: measure(replace(config, clusters=count)).kl, ladder))


def fewest_clusters(kl_of: Callable[[int], float], ladder: Sequence[int]) -> int:
    """Climb until two counts in a row bring no new best by the margin; give the fewest within the margin of the best.

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
