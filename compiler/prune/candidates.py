"""The neurons of a layer that clusters may keep.

Clusters agree on most of what they do without: those of 16 that keep 0.4 of SmolLM2's neurons keep 0.59 of them
together. So what goes first when neurons are removed by all text, and no cluster's scores speak for, is left out of
account before each cluster removes its own: sums over text, and removal, are of what is left.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.families import assign_ffn, ffn_tensors
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.samples import num_candidates

from .select import Choice
from .sensitivity import RemovalCurves

__all__ = ["Ids", "cut_to_candidates", "layer_candidates", "positions_in"]

Ids = npt.NDArray[np.int32]


def layer_candidates(
    config: CompileConfig,
    loaded: LoadedModel,
    curves: RemovalCurves | None,
    choices: Mapping[str, Choice],
    budgets: Mapping[str, Sequence[Sequence[int]]],
) -> tuple[Ids | None, ...]:
    """Find each layer's candidates, ascending; None where all neurons are.

    They have the highest sums of two ranks: of when they go by all text, and of their score, in the cluster that it is
    highest in.

    Args:
        choices: assignment name -> scores.
        budgets: budgets[assignment name][cluster][layer], how many neurons are kept.
    Returns:
        Nothing where layers are not narrowed one after another by second order, or all neurons have to be computed
        anyway: gates that are compared with the mean of all gates of their layer.
    """
    if curves is None or not config.effective_carry or config.effective_removal != "second-order":
        return ()
    if any(loaded.cutoff(layer) is not None for layer in range(loaded.record.num_layers)):
        return ()
    by_cluster = [budget for clusters in budgets.values() for budget in clusters]
    found: list[Ids | None] = []
    for layer, own in enumerate(curves.order):
        number = num_candidates(max(budget[layer] for budget in by_cluster), len(own))
        scored = [_ranks(scores) for choice in choices.values() for scores in choice.scores[:, layer]]
        ranks = np.argsort(own) + np.max(scored, axis=0)
        last = np.argsort(-ranks, kind="stable")[:number]
        found.append(None if number == len(own) else np.sort(last).astype(np.int32))
    return tuple(found)


def _ranks(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """How many scores are lower than each: (neurons,)."""
    return np.argsort(np.argsort(scores, kind="stable"))


def positions_in(candidates: Ids | None, neuron_ids: Ids) -> Ids:
    """Where some neurons stand among the candidates."""
    return neuron_ids if candidates is None else np.searchsorted(candidates, neuron_ids).astype(np.int32)


@contextmanager
def cut_to_candidates(loaded: LoadedModel, layer: int, candidates: Ids | None) -> Iterator[None]:
    """Run the block with the layer's candidates alone in what enters its FFN; its down projection stays as it is."""
    if candidates is None:
        yield
        return
    module, own = loaded.layers[layer], ffn_tensors(loaded.layers[layer], loaded.family)
    ids = torch.from_numpy(candidates).long().to(loaded.device)
    cut = {role: tensor if role in ("down", "down_bias") else tensor[ids] for role, tensor in own.items()}
    assign_ffn(module, loaded.family, cut)
    try:
        yield
    finally:
        assign_ffn(module, loaded.family, own)
