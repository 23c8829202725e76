"""Stage `evaluate`: what narrowing costs, on text that was not calibrated on.

Each text's first half is read with the dense FFN, the second half is decoded narrow under teacher forcing. The
reference is the model with its own weights.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.manifest import ClusterQuality, Quality
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.prune.narrow import CLUSTERS, Cut

from .reference import Reference, as_stored
from .stored import StoredModel
from .tally import Tally

__all__ = ["evaluate"]


def evaluate(
    loaded: LoadedModel,
    reference: Reference,
    models: Mapping[str, tuple[Cut, npt.NDArray[np.int64]]],
    progress: Progress,
    stored: StoredModel | None = None,
) -> Quality:
    """Measure the clusters' packs and the controls.

    Args:
        reference: the held-out texts, read with the same `stored`.
        models: assignment name -> its FFN and (texts,) cluster of each text.
        stored: what runs with the narrow FFN (attention, embedding, head) is as stored there; None for the model's own
            weights.
    """
    with (
        progress.stage("evaluate", len(reference.texts) * len(models)) as advance,
        torch.inference_mode(),
        as_stored(stored),
    ):
        tallies = {name: _tallies(loaded, reference, cut, labels, advance) for name, (cut, labels) in models.items()}
    return _quality(reference, tallies)


def _tallies(
    loaded: LoadedModel, reference: Reference, cut: Cut, labels: npt.NDArray[np.int64], advance: Advance
) -> dict[int, Tally]:
    """Score each text by the FFN of its cluster: cluster -> tally."""
    members = {cluster: np.flatnonzero(labels == cluster).tolist() for cluster in np.unique(labels).tolist()}
    return {cluster: _narrow_tally(loaded, reference, cut, cluster, own, advance) for cluster, own in members.items()}


def _narrow_tally(
    loaded: LoadedModel, reference: Reference, cut: Cut, cluster: int, members: Sequence[int], advance: Advance
) -> Tally:
    tally = Tally()
    with ffn_in_use(loaded, cut, cluster):
        for number in members:
            text = reference.texts[number]
            logits = loaded.forward(text.token_ids[:, text.start :], text.cache())
            tally.add(text.compare(logits[0, :-1], number))
            advance()
    return tally


def _quality(reference: Reference, tallies: dict[str, dict[int, Tally]]) -> Quality:
    totals = {}
    for name, by_cluster in tallies.items():
        totals[name] = Tally()
        for tally in by_cluster.values():
            totals[name].add(tally)
    return Quality(
        dense=reference.dense,
        clusters=totals[CLUSTERS].score(CLUSTERS),
        controls=tuple(total.score(name) for name, total in totals.items() if name != CLUSTERS),
        per_cluster=tuple(
            ClusterQuality(cluster=cluster, score=tally.score(f"cluster {cluster}"))
            for cluster, tally in tallies[CLUSTERS].items()
        ),
    )
