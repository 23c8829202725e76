"""From a quality to a keep ratio: the narrowest packs whose held-out quality is still good enough."""

import logging
from collections.abc import Callable
from dataclasses import replace

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import Score

from .config import CompileConfig

__all__ = ["fit_quality", "least_keep"]

_log = logging.getLogger(__name__)
_NUM_TRIES = 6

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
