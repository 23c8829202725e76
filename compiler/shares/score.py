"""What token shares cost, on text that nothing was set by, beside the control: equal shares at the same bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import ShareScore
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.token_shares import shares_at, thresholds_at
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.quality.reference import Reference
from coreinfer.compiler.quality.stored import StoredModel, StoredPacks, base_in_use, dense_cut
from coreinfer.compiler.quality.tally import Tally
from coreinfer.runtime.engines.torch.input_masks import InputCounts

from .inputs import group_weights, inputs_masked, read_norms
from .token_shares import Arrays, named

__all__ = ["SharedWeights", "score_token_shares"]

Floats = npt.NDArray[np.float32]
Weights = Literal["dense", "clusters"]


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """What is read, and what of it a token leaves out.

    Attributes:
        arrays: of `find_token_shares`.
        labels: (texts,) the cluster of each held-out text.
    """

    stored: StoredModel
    packs: StoredPacks
    arrays: Arrays
    labels: npt.NDArray[np.int64]

    def members(self, weights: Weights) -> dict[int | None, list[int]]:
        """Cluster whose pack decodes, or None for the dense FFN -> numbers of its texts."""
        if weights == "dense":
            return {None: list(range(len(self.labels)))}
        return {number: np.flatnonzero(self.labels == number).tolist() for number in np.unique(self.labels).tolist()}


def score_token_shares(
    reference: Reference, shared: SharedWeights, share: float, progress: Progress
) -> tuple[ShareScore, ...]:
    """Measure a share of the layers' bytes on the reference's texts, with the dense FFN and with the packs."""
    num_steps = 4 * len(reference.texts)
    with progress.stage("evaluate", num_steps) as advance, torch.inference_mode(), base_in_use(shared.stored):
        return tuple(_scores(reference, shared, share, advance))


def _scores(reference: Reference, shared: SharedWeights, share: float, advance: Advance) -> Iterator[ShareScore]:
    record, arrays = shared.stored.loaded.record, shared.arrays
    planned = shares_at(arrays["targets"], arrays["plan"], share)
    equal = np.full((record.num_layers, len(INPUT_GROUPS)), share, dtype=np.float32)
    weights: Weights
    for weights in ("dense", "clusters"):
        yield _score(reference, shared, weights, planned, advance, asked=share, name="planned")
        yield _score(reference, shared, weights, equal, advance, asked=share, name="equal")


def _score(
    reference: Reference,
    shared: SharedWeights,
    weights: Weights,
    shares: Floats,
    advance: Advance,
    *,
    asked: float,
    name: Literal["planned", "equal"],
) -> ShareScore:
    tally, counts = Tally(), InputCounts()
    for cluster, numbers in shared.members(weights).items():
        tally.add(_tally(reference, shared, cluster, numbers, shares, counts, advance))
    read = counts.share(group_weights(shared.stored.loaded))
    label = "token share" if name == "planned" else "equal shares"
    score = tally.score(f"{weights}, {label} {asked:g}")
    return ShareScore(weights=weights, shares=name, asked=asked, read=round(read, 4), score=score)


def _tally(
    reference: Reference,
    shared: SharedWeights,
    cluster: int | None,
    numbers: Sequence[int],
    shares: Floats,
    counts: InputCounts,
    advance: Advance,
) -> Tally:
    stored, tally = shared.stored, Tally()
    base = TensorFile(stored.folder / LAYOUT.base)
    if cluster is None:
        cut, number, known = dense_cut(stored), 0, shared.arrays["thresholds.dense"]
        ffn = TensorFile(stored.folder / LAYOUT.dense)
    else:
        cut, number, known = shared.packs.cut, cluster, shared.arrays[f"thresholds.{cluster}"]
        ffn = TensorFile(shared.packs.folder / LAYOUT.cluster(cluster))
    loaded, norms = stored.loaded, read_norms(stored.loaded, base, ffn)
    thresholds = named(loaded, thresholds_at(shared.arrays["levels"], known, shares))
    with ffn_in_use(loaded, cut, number), inputs_masked(loaded, norms, thresholds, counts):
        for place in numbers:
            text = reference.texts[place]
            logits = loaded.forward(text.token_ids[:, text.start :], text.cache())
            tally.add(text.compare(logits[0, :-1], place))
            advance()
    return tally
