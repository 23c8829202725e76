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
from coreinfer.compiler.prune.narrow import CLUSTERS, Cut, CutOf
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Shared, Team, Worker

from .reference import PlaceTexts, Reference, ReferenceText, as_stored, tallies_of, texts_of
from .stored import StoredModel
from .tally import Tally
from .together import Batches, parts_of

__all__ = ["evaluate"]

_STAGE = "evaluate"


def evaluate(
    team: Team,
    reference: Reference,
    models: Mapping[str, tuple[CutOf, npt.NDArray[np.int64]]],
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
    num_steps = reference.num_texts * len(models)
    with progress.stage(_STAGE, num_steps) as advance:
        steps = Steps(advance)
        asked = []
        for place, texts in reference.places.items():
            own = {name: (cut, _members(labels, reference.numbers[place])) for name, (cut, labels) in models.items()}
            asked.append(team.call(place, _STAGE, _place_tallies, texts, own, stored, steps))
        by_place = [waiting.result() for waiting in asked]
        steps.reach(num_steps)
    tallies = {
        name: _by_cluster(labels, {n: tally for found in by_place for n, tally in found[name].items()})
        for name, (_, labels) in models.items()
    }
    return _quality(reference, tallies)


def _members(labels: npt.NDArray[np.int64], numbers: Sequence[int]) -> dict[int, list[int]]:
    """Cluster -> numbers of its texts, among some."""
    own = labels[list(numbers)]
    return {
        cluster: [number for number, label in zip(numbers, own.tolist(), strict=True) if label == cluster]
        for cluster in np.unique(own).tolist()
    }


def _by_cluster(labels: npt.NDArray[np.int64], tallies: Mapping[int, Tally]) -> dict[int, Tally]:
    """Add the texts' tallies by their clusters, in the order of the texts, whoever read them."""
    totals = {cluster: Tally() for cluster in np.unique(labels).tolist()}
    for number, cluster in enumerate(labels.tolist()):
        totals[cluster].add(tallies[number])
    return totals


@torch.inference_mode()
def _place_tallies(
    worker: Worker,
    shared: Shared[PlaceTexts],
    models: Mapping[str, tuple[CutOf, Mapping[int, Sequence[int]]]],
    stored: StoredModel | None,
    advance: Advance,
) -> dict[str, dict[int, Tally]]:
    """Score each of a place's texts by the FFN of its cluster: assignment name -> number of the text -> tally."""
    loaded, texts, batches = worker.loaded, texts_of(worker, shared), shared.value().batches
    with as_stored(loaded, stored):
        return {
            name: _tallies(loaded, texts, batches, cut(loaded), members, advance)
            for name, (cut, members) in models.items()
        }


def _tallies(
    loaded: LoadedModel,
    texts: Mapping[int, ReferenceText],
    batches: Batches,
    cut: Cut,
    members: Mapping[int, Sequence[int]],
    advance: Advance,
) -> dict[int, Tally]:
    tallies = {}
    for cluster, numbers in members.items():
        with ffn_in_use(loaded, cut, cluster):
            tallies.update(tallies_of(loaded, texts, [*parts_of(batches, frozenset(numbers))], advance))
    return tallies


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
