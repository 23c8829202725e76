"""What is lost and read where tokens leave inputs out: held-out texts, some of them in one way, others in another."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache as run_once
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import ATTENTION_GROUPS, FFN_GROUPS
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.token_shares import shares_at, thresholds_at
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.quality.reference import PlaceTexts, Reference, tallies_of, texts_of
from coreinfer.compiler.quality.stored import StoredModel, StoredPacks, base_in_use, dense_cut
from coreinfer.compiler.quality.tally import Tally
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Shared, Team, Worker
from coreinfer.runtime.engines.torch.wanted_inputs import InputCounts

from .halves import low_weights
from .inputs import LowWeights, Norms, inputs_taken, read_norms
from .token_shares import Arrays, named

__all__ = ["Measured", "Part", "SharedWeights", "measure_parts", "part_inputs"]

Floats = npt.NDArray[np.float32]
_STAGE = "evaluate"


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """What is read, and what of it a token leaves out.

    Attributes:
        packs: of the clusters; None where all are thin.
        arrays: of `find_token_shares`.
        labels: (texts,) the cluster of each held-out text.
    """

    stored: StoredModel
    packs: StoredPacks | None
    arrays: Arrays
    labels: npt.NDArray[np.int64]

    @property
    def has_thin(self) -> bool:
        """Whether any cluster decodes with the dense FFN."""
        return self.packs is None or bool(self.packs.thin)

    def planned(self, share: float) -> Floats:
        """Each group's share of its inputs where the layers have a share of their bytes: (layers, 4)."""
        return shares_at(self.arrays["targets"], self.arrays["plan"], share)

    def members(self, labels: npt.NDArray[np.int64] | None = None) -> dict[int, tuple[int, ...]]:
        """Cluster -> numbers of its texts, ascending, by their own labels or by others."""
        labels = self.labels if labels is None else labels
        return {cluster: tuple(np.flatnonzero(labels == cluster).tolist()) for cluster in np.unique(labels).tolist()}

    def part(self, cluster: int, numbers: Sequence[int], shares: Floats) -> "Part":
        """Texts that decode as a cluster's do."""
        ffn = None if self.packs is None or cluster in self.packs.thin else cluster
        return Part(ffn=ffn, thresholds=str(cluster), shares=shares, numbers=tuple(numbers))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some texts, and what decodes them.

    Attributes:
        ffn: cluster whose pack does; None for the dense FFN.
        thresholds: whose: "dense", or a cluster's number.
        shares: (layers, 4) of the inputs.
        numbers: of the texts.
    """

    ffn: int | None
    thresholds: str
    shares: Floats
    numbers: tuple[int, ...]


@dataclass(kw_only=True)
class Measured:
    """Number of a text -> its tally, and the inputs that were wanted."""

    tallies: dict[int, Tally] = field(default_factory=dict)
    counts: InputCounts = field(default_factory=InputCounts)

    def merge(self, other: "Measured") -> None:
        """Add what was measured elsewhere, of other texts."""
        self.tallies.update(other.tallies)
        self.counts.merge(other.counts)

    @property
    def tally(self) -> Tally:
        """All texts, added in their order, whoever read them."""
        total = Tally()
        for number in sorted(self.tallies):
            total.add(self.tallies[number])
        return total


def measure_parts(
    team: Team, reference: Reference, shared: SharedWeights, parts: Sequence[Part], progress: Progress
) -> list[Measured]:
    """Measure each part on the reference's texts."""
    num_steps = sum(len(part.numbers) for part in parts)
    weights_known = team.share(shared)
    with progress.stage(_STAGE, num_steps) as advance:
        steps = Steps(advance)
        asked = [
            team.call(place, _STAGE, _place_parts, texts, weights_known, reference.numbers[place], parts, steps)
            for place, texts in reference.places.items()
        ]
        by_place = [waiting.result() for waiting in asked]
        steps.reach(num_steps)
    found = [Measured() for _ in parts]
    for place_parts in by_place:
        for total, own in zip(found, place_parts, strict=True):
            total.merge(own)
    return found


@torch.inference_mode()
def _place_parts(
    worker: Worker,
    texts: Shared[PlaceTexts],
    known: Shared[SharedWeights],
    numbers: Sequence[int],
    parts: Sequence[Part],
    advance: Advance,
) -> list[Measured]:
    """Score a place's texts of each part."""
    shared, here = known.value(), texts_of(worker, texts)
    reading, own_numbers = _reading(worker.loaded, shared), frozenset(numbers)
    found = []
    with base_in_use(worker.loaded, shared.stored):
        for part in parts:
            measured = Measured()
            # One by one: a batch's padding would be counted.
            if own := [(number,) for number in part.numbers if number in own_numbers]:
                with reading(part, measured.counts):
                    measured.tallies.update(tallies_of(worker.loaded, here, own, advance))
            found.append(measured)
    return found


def _reading(loaded: LoadedModel, shared: SharedWeights) -> Callable[[Part, InputCounts], AbstractContextManager[None]]:
    """A function that runs a block with what a part reads, counting its inputs; the dense FFN is unpacked once."""
    dense, taken = run_once(dense_cut(loaded, shared.stored)), part_inputs(loaded, shared)

    @contextmanager
    def reading(part: Part, counts: InputCounts) -> Iterator[None]:
        # The dense FFN's layers are known by the cluster 0, as those of one cluster.
        cut, number = (dense, 0) if part.ffn is None else (_packs_of(shared).cut(loaded), part.ffn)
        with ffn_in_use(loaded, cut, number), taken(part, counts):
            yield

    return reading


def _packs_of(shared: SharedWeights) -> StoredPacks:
    assert shared.packs is not None
    return shared.packs


def part_inputs(
    loaded: LoadedModel, shared: SharedWeights
) -> Callable[[Part, InputCounts | None], AbstractContextManager[None]]:
    """A function that runs a block with the inputs that a part takes, whatever FFN is in use, and may count them.

    What low bits add to the base, the dense FFN and the last pack in use stays in memory.
    """
    stored, ratios = shared.stored, shared.arrays["half_ratios"]
    base, dense = TensorFile(stored.folder / LAYOUT.base), TensorFile(stored.folder / LAYOUT.dense)
    base_low = run_once(partial(low_weights, loaded, base, ratios, ATTENTION_GROUPS))

    def known(ffn: TensorFile) -> tuple[Norms, LowWeights]:
        return read_norms(loaded, base, ffn), {**base_low(), **low_weights(loaded, ffn, ratios, FFN_GROUPS)}

    dense_known = run_once(partial(known, dense))
    pack_known = lru_cache(maxsize=1)(lambda cluster: known(_packs_of(shared).ffn(cluster)))

    def taken(part: Part, counts: InputCounts | None = None) -> AbstractContextManager[None]:
        norms, low = dense_known() if part.ffn is None else pack_known(part.ffn)
        limits = thresholds_at(
            shared.arrays["levels"], shared.arrays[f"thresholds.{part.thresholds}"], part.shares, ratios
        )
        return inputs_taken(loaded, norms, named(loaded, limits), low, counts)

    return taken
