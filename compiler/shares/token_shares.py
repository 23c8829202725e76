"""Stage `shares`: thresholds by which a token chooses its inputs, and how layers and groups share what it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache as run_once
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.contract import ATTENTION_GROUPS, FFN_GROUPS, INPUT_GROUPS
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor, TensorFile, write_tensors
from coreinfer.bundles.token_shares import thresholds_at
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.prune.narrow import Cut
from coreinfer.compiler.quality.stored import StoredModel, StoredPacks, base_in_use, dense_cut
from coreinfer.compiler.samples import SHARE_COST_TOKENS, share_tokens
from coreinfer.compiler.text.corpus import SAMPLING, Document, spread_sample
from coreinfer.runtime.engines.torch.wanted_inputs import Groups

from .costs import group_costs
from .halves import low_energies, low_weights
from .inputs import Norms, group_weights, groups_of, read_norms
from .plan import TARGETS, plan_shares
from .texts import begin_texts
from .thresholds import LEVELS, half_ratios, lost_energies, sample_scores, thresholds_of

__all__ = [
    "Arrays",
    "ShareInputs",
    "find_token_shares",
    "has_halves",
    "named",
    "renew_thresholds",
    "shares_key",
    "write_token_shares",
]

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, Floats]
"""Tensors of the file, by name; those of the dense FFN are among them even if it is left out."""

_REVISION = 6
_MEASURED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class ShareInputs:
    """What token shares are made of.

    Attributes:
        documents: calibration text.
        labels: (documents,) their clusters.
        packs: of the clusters; None where all are thin and decode with the dense FFN.
        halves: whether inputs are read in half, of weights that are all int4.
    """

    loaded: LoadedModel
    stored: StoredModel
    packs: StoredPacks | None
    documents: Sequence[Document]
    labels: npt.NDArray[np.int64]
    seed: int
    halves: bool

    @property
    def num_clusters(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1

    @property
    def texts(self) -> list[list[Document]]:
        """Text of all, and then of each cluster."""
        tokens = share_tokens(self.num_clusters)
        own = [
            [document for document, label in zip(self.documents, self.labels, strict=True) if label == cluster]
            for cluster in range(self.num_clusters)
        ]
        return [spread_sample(found, tokens) for found in (self.documents, *own)]


def find_token_shares(inputs: ShareInputs, cache: Cache, upstream: str, progress: Progress) -> Arrays:
    """Set thresholds on calibration text, and plan shares by what each group alone costs the model.

    Args:
        upstream: key of the packs, or of all that thin clusters depend on.
    """

    def compute() -> dict[str, Any]:
        cost_texts = spread_sample(_longer_half(inputs.documents), SHARE_COST_TOKENS)
        num_steps = inputs.num_clusters + 1 + len(cost_texts)
        with progress.stage("shares", num_steps) as advance:
            return _compute(inputs, cost_texts, advance)

    return cache.arrays(shares_key(inputs, upstream), compute)


def shares_key(inputs: ShareInputs, upstream: str) -> str:
    """Key of what `find_token_shares` returns."""
    formats = asdict(inputs.stored.packer.formats)
    return stage_key(
        "shares", upstream=upstream, revision=_REVISION, sampling=SAMPLING, formats=formats, halves=inputs.halves
    )


def renew_thresholds(inputs: ShareInputs, arrays: Arrays, cache: Cache, upstream: str, progress: Progress) -> Arrays:
    """Set thresholds of the clusters that have packs, by these; the dense FFN's, ratios, costs and the plan stay.

    Args:
        arrays: of `find_token_shares`, with other packs or with none.
        upstream: key of the packs.
    """
    assert inputs.packs is not None
    own = [cluster for cluster in range(inputs.num_clusters) if cluster not in inputs.packs.thin]

    def compute() -> dict[str, Any]:
        base, ffn = (TensorFile(inputs.stored.folder / name) for name in (LAYOUT.base, LAYOUT.dense))
        norms, dense = read_norms(inputs.loaded, base, ffn), run_once(dense_cut(inputs.loaded, inputs.stored))
        with progress.stage("shares", len(own)) as advance, base_in_use(inputs.loaded, inputs.stored):
            return _own_thresholds(inputs, own, dense, norms, arrays["half_ratios"], advance)

    key = stage_key("thresholds", upstream=shares_key(inputs, upstream), clusters=own)
    return {**arrays, **cache.arrays(key, compute)}


def _longer_half(documents: Sequence[Document]) -> list[Document]:
    """Take the longer documents, in their order: as many tokens in fewer runs."""
    least = float(np.median([len(document.token_ids) for document in documents]))
    return [document for document in documents if len(document.token_ids) >= least]


def _compute(inputs: ShareInputs, cost_texts: Sequence[Document], advance: Advance) -> dict[str, Any]:
    """Thresholds are of the stored weights, costs of the model's own, through which gradients go."""
    loaded, folder = inputs.loaded, inputs.stored.folder
    base, ffn = TensorFile(folder / LAYOUT.base), TensorFile(folder / LAYOUT.dense)
    norms, dense = read_norms(loaded, base, ffn), run_once(dense_cut(loaded, inputs.stored))
    with base_in_use(loaded, inputs.stored):
        scores = _scores(inputs, dense, 0, dense, inputs.texts[0], norms)
        lost = low_energies(loaded, base, ffn, norms) if inputs.halves else np.zeros(_shape(loaded), np.float32)
        ratios = half_ratios(loaded, scores, lost) if inputs.halves else np.ones(_shape(loaded), np.float32)
        thresholds = {"thresholds.dense": thresholds_of(loaded, scores, ratios)}
        advance()
        thresholds |= _own_thresholds(inputs, range(inputs.num_clusters), dense, norms, ratios, advance)
    half = np.full(_shape(loaded), _MEASURED_SHARE, np.float32)
    limits = named(loaded, thresholds_at(LEVELS, thresholds["thresholds.dense"], half, ratios))
    low = low_weights(loaded, base, ratios, ATTENTION_GROUPS) | low_weights(loaded, ffn, ratios, FFN_GROUPS)
    begun = begin_texts(loaded, None, cost_texts)
    costs = group_costs(loaded, begun, norms, limits, low, advance, seed=inputs.seed)
    energies = lost_energies(loaded, scores, ratios, lost)
    plan = plan_shares(costs, energies, group_weights(loaded), measured_at=_MEASURED_SHARE)
    return {"levels": LEVELS, "targets": TARGETS, "plan": plan, "half_ratios": ratios, **thresholds}


def _own_thresholds(
    inputs: ShareInputs, clusters: Sequence[int], dense: Cut, norms: Norms, ratios: Floats, advance: Advance
) -> dict[str, Floats]:
    """Thresholds of some clusters, each by its own text and with what decodes it."""
    loaded, base, found = inputs.loaded, TensorFile(inputs.stored.folder / LAYOUT.base), dict[str, Floats]()
    texts = inputs.texts[1:]
    for cluster in clusters:
        documents = texts[cluster]
        if inputs.packs is None or cluster in inputs.packs.thin:
            own = _scores(inputs, dense, 0, dense, documents, norms)
        else:
            own_norms = read_norms(loaded, base, inputs.packs.ffn(cluster))
            own = _scores(inputs, inputs.packs.cut(loaded), cluster, dense, documents, own_norms)
        found[f"thresholds.{cluster}"] = thresholds_of(loaded, own, ratios)
        advance()
    return found


def _scores(
    inputs: ShareInputs, cut: Cut, cluster: int, dense: Cut, documents: Sequence[Document], norms: Norms
) -> dict[Groups, Floats]:
    begun = begin_texts(inputs.loaded, dense, documents)
    with ffn_in_use(inputs.loaded, cut, cluster):
        return sample_scores(inputs.loaded, begun, norms, seed=inputs.seed)


def _shape(loaded: LoadedModel) -> tuple[int, int]:
    return loaded.record.num_layers, len(INPUT_GROUPS)


def named(loaded: LoadedModel, values: Floats) -> dict[Groups, tuple[float, float]]:
    """Name (layers, 4, 2) thresholds by their groups."""
    pairs = [(low, high) for low, high in values.reshape(-1, 2).tolist()]
    return dict(zip(groups_of(loaded), pairs, strict=True))


def write_token_shares(path: Path, arrays: Arrays, *, with_dense: bool) -> None:
    """Write the file; where nothing is read in half it is what it was before there were halves."""
    tensors = {name: StoredTensor("F32", np.asarray(values)) for name, values in arrays.items()}
    if not with_dense:
        del tensors["thresholds.dense"]
    if not has_halves(arrays):
        del tensors["half_ratios"]
    write_tensors(path, tensors)


def has_halves(arrays: Arrays) -> bool:
    """Whether any group's inputs are read in half."""
    return bool(np.any(arrays["half_ratios"] > 1))
