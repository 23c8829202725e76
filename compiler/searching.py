"""From what is wanted to options: the narrowest packs of a quality, the fewest clusters that earn their place."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import Score

from .config import CompileConfig

__all__ = ["fewest_clusters", "fit_clusters", "fit_quality", "least_keep"]

_log = logging.getLogger(__name__)
_NUM_TRIES = 6
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

    def holds(keep: float) -> bool:
        score = measure(replace(config, keep=keep))
        _log.info("keep %.3f: held-out KL %.4f, top-1 %.4f", keep, score.kl, score.top1)
        return _holds(config, score)

    return replace(config, keep=least_keep(holds, least=max(config.min_layer_keep, 0.05)))


def _holds(config: CompileConfig, score: Score) -> bool:
    return (config.max_kl is None or score.kl <= config.max_kl) and (
        config.min_top1 is None or score.top1 >= config.min_top1
    )


def least_keep(holds: Callable[[float], bool], *, least: float, num_tries: int = _NUM_TRIES) -> float:
    """Find the lowest keep ratio that holds, by bisection; quality is taken to rise with the ratio.

    Args:
        holds: is asked for `num_tries` ratios at most; ratio 1, which is the dense model, holds without being asked.
        least: the lowest ratio to try.
    Returns:
        A ratio that holds, at most (1 - least) / 2**num_tries above one that does not.
    """
    low, high = least, 1.0
    for _ in range(num_tries):
        middle = round((low + high) / 2, 4)
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


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
