"""Whether leaving inputs out can save time: said before a compile spends any on it."""

import logging

import numpy as np
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.options import Format

from .inputs import group_outputs, group_weights

__all__ = ["LEAST_OUTPUTS", "short_share", "warn_of_no_gain"]

_log = logging.getLogger(__name__)

LEAST_OUTPUTS: dict[Format, int] = {"int4": 2048, "int8": 1024, "bf16": 512}
"""Of a group whose columns the native engine may leave out, by format: those of `LEAST_COLUMN_BYTES`, 1 kB."""


def short_share(loaded: LoadedModel, quantize: Format) -> float:
    """Return the share of the layers' weights in groups that the native engine reads whole in a format.

    A column of one input over all outputs of its group, or of an expert's, is shorter than 1 kB there, and holes that
    short save no time (docs/dev/token_shares.md). Of a mixture, weights are those that a token reads.
    """
    weights = group_weights(loaded).sum(axis=0)
    return float(np.sum(weights, where=np.array(group_outputs(loaded)) < LEAST_OUTPUTS[quantize]) / np.sum(weights))


def warn_of_no_gain(config: CompileConfig, loaded: LoadedModel) -> None:
    """Say what of a model the native engine will read whatever its token share is."""
    if (share := short_share(loaded, config.quantize)) > 0:
        _log.warning(
            "--token-share: with --quantize %s columns of %.0f%% of the layers' weights are shorter than 1 kB, and the "
            "native engine reads these weights whole: inputs that they leave out cost quality and save nothing",
            config.quantize,
            100 * share,
        )
