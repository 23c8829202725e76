"""What token shares cost, on text that nothing was set by, beside the control: equal shares at the same bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import ShareScore
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.token_shares import shares_at, thresholds_at
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.quality.reference import PlaceTexts, Reference, texts_of
from coreinfer.compiler.quality.stored import StoredModel, StoredPacks, base_in_use, dense_cut
from coreinfer.compiler.quality.tally import Tally
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Shared, Team, Worker
from coreinfer.runtime.engines.torch.wanted_inputs import InputCounts

from .inputs import group_weights, inputs_masked, read_norms
from .token_shares import Arrays, named

__all__ = ["SharedWeights", "score_token_shares"]

Floats = npt.NDArray[np.float32]
Weights = Literal["dense", "clusters"]
_STAGE = "evaluate"


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

    def members(self, weights: Weights, numbers: Sequence[int]) -> dict[int | None, list[int]]:
        """Cluster whose pack decodes, or None for the dense FFN -> its texts' numbers, of some texts."""
        if weights == "dense":
            return {None: list(numbers)}
        clusters = np.unique(self.labels[list(numbers)]).tolist()
        return {cluster: [number for number in numbers if self.labels[number] == cluster] for cluster in clusters}


def score_token_shares(
    team: Team, reference: Reference, shared: SharedWeights, share: float, progress: Progress
) -> tuple[ShareScore, ...]:
    """Measure a share of the layers' bytes on the reference's texts, with the dense FFN and with the packs."""
    rows, num_steps = _rows(team.loaded, shared, share), 4 * reference.num_texts
    weights_known = team.share(shared)
    with progress.stage(_STAGE, num_steps) as advance:
        steps = Steps(advance)
        asked = [
            team.call(place, _STAGE, _place_rows, texts, weights_known, reference.numbers[place], rows, steps)
            for place, texts in reference.places.items()
        ]
        by_place = [waiting.result() for waiting in asked]
        steps.reach(num_steps)
    sizes = group_weights(team.loaded)
    return tuple(_score(row, [found[number] for found in by_place], sizes) for number, row in enumerate(rows))


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What is measured.

    Attributes:
        shares: (layers, 4) of the inputs.
        asked: share of the layers' bytes.
    """

    weights: Weights
    name: Literal["planned", "equal"]
    shares: Floats
    asked: float


@dataclass(kw_only=True)
class _Measured:
    """Of some texts: number of a text -> its tally, and the inputs that were wanted."""

    tallies: dict[int, Tally] = field(default_factory=dict)
    counts: InputCounts = field(default_factory=InputCounts)


def _rows(loaded: LoadedModel, shared: SharedWeights, share: float) -> list[_Row]:
    planned = shares_at(shared.arrays["targets"], shared.arrays["plan"], share)
    equal = np.full((loaded.record.num_layers, len(INPUT_GROUPS)), share, dtype=np.float32)
    kinds: tuple[Weights, ...] = ("dense", "clusters")
    return [
        row
        for weights in kinds
        for row in (
            _Row(weights=weights, name="planned", shares=planned, asked=share),
            _Row(weights=weights, name="equal", shares=equal, asked=share),
        )
    ]


def _score(row: _Row, measured: Sequence[_Measured], sizes: Floats) -> ShareScore:
    """Add up what all places measured, text by text."""
    tally, counts = Tally(), InputCounts()
    tallies = {number: own for found in measured for number, own in found.tallies.items()}
    for number in sorted(tallies):
        tally.add(tallies[number])
    for found in measured:
        counts.merge(found.counts)
    label = "token share" if row.name == "planned" else "equal shares"
    return ShareScore(
        weights=row.weights,
        shares=row.name,
        asked=row.asked,
        read=round(counts.share(sizes), 4),
        score=tally.score(f"{row.weights}, {label} {row.asked:g}"),
    )


@torch.inference_mode()
def _place_rows(
    worker: Worker,
    texts: Shared[PlaceTexts],
    known: Shared[SharedWeights],
    numbers: Sequence[int],
    rows: Sequence[_Row],
    advance: Advance,
) -> list[_Measured]:
    """Score each of a place's texts in each way."""
    shared, own_texts = known.value(), texts_of(worker, texts)
    found = []
    with base_in_use(worker.loaded, shared.stored):
        for row in rows:
            measured = _Measured()
            for cluster, members in shared.members(row.weights, numbers).items():
                own = [own_texts[number] for number in members]
                with _masked(worker.loaded, shared, cluster, row.shares, measured.counts):
                    for number, text in zip(members, own, strict=True):
                        logits = worker.loaded.forward(text.token_ids[:, text.start :], text.cache())
                        measured.tallies[number] = text.compare(logits[0, :-1], number)
                        advance()
            found.append(measured)
    return found


@contextmanager
def _masked(
    loaded: LoadedModel, shared: SharedWeights, cluster: int | None, shares: Floats, counts: InputCounts
) -> Iterator[None]:
    """Run the block with a cluster's pack, or with None the dense FFN, without what these shares leave out."""
    stored = shared.stored
    base = TensorFile(stored.folder / LAYOUT.base)
    if cluster is None:
        cut, number, known = dense_cut(loaded, stored), 0, shared.arrays["thresholds.dense"]
        ffn = TensorFile(stored.folder / LAYOUT.dense)
    else:
        cut, number, known = shared.packs.cut(loaded), cluster, shared.arrays[f"thresholds.{cluster}"]
        ffn = TensorFile(shared.packs.folder / LAYOUT.cluster(cluster))
    norms = read_norms(loaded, base, ffn)
    thresholds = named(loaded, thresholds_at(shared.arrays["levels"], known, shares))
    with ffn_in_use(loaded, cut, number), inputs_masked(loaded, norms, thresholds, counts):
        yield
