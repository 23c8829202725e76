"""Stage `shares`: thresholds by which a token chooses its inputs, and how layers and groups share what it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache as run_once
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.contract import INPUT_GROUPS
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
from .inputs import Norms, group_weights, groups_of, read_norms
from .plan import TARGETS, plan_shares
from .texts import begin_texts
from .thresholds import LEVELS, lost_energies, sample_scores, thresholds_of

__all__ = ["Arrays", "ShareInputs", "find_token_shares", "named", "write_token_shares"]

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, Floats]
"""Tensors of the file, by name; those of the dense FFN are among them even if it is left out."""

_REVISION = 4
_MEASURED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class ShareInputs:
    """What token shares are made of.

    Attributes:
        documents: calibration text.
        labels: (documents,) their clusters.
        packs: of the clusters; None where they are thin and decode with the dense FFN.
    """

    loaded: LoadedModel
    stored: StoredModel
    packs: StoredPacks | None
    documents: Sequence[Document]
    labels: npt.NDArray[np.int64]
    seed: int

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
    formats = asdict(inputs.stored.packer.formats)
    key = stage_key("shares", upstream=upstream, revision=_REVISION, sampling=SAMPLING, formats=formats)

    def compute() -> dict[str, Any]:
        cost_texts = spread_sample(_longer_half(inputs.documents), SHARE_COST_TOKENS)
        num_steps = inputs.num_clusters + 1 + len(cost_texts)
        with progress.stage("shares", num_steps) as advance:
            return _compute(inputs, cost_texts, advance)

    return cache.arrays(key, compute)


def _longer_half(documents: Sequence[Document]) -> list[Document]:
    """Take the longer documents, in their order: as many tokens in fewer runs."""
    least = float(np.median([len(document.token_ids) for document in documents]))
    return [document for document in documents if len(document.token_ids) >= least]


def _compute(inputs: ShareInputs, cost_texts: Sequence[Document], advance: Advance) -> dict[str, Any]:
    """Thresholds are of the stored weights, costs of the model's own, through which gradients go."""
    loaded, folder = inputs.loaded, inputs.stored.folder
    norms = read_norms(loaded, TensorFile(folder / LAYOUT.base), TensorFile(folder / LAYOUT.dense))
    with base_in_use(loaded, inputs.stored):
        thresholds, scores = _thresholds(inputs, norms, advance)
    half = thresholds_at(LEVELS, thresholds["thresholds.dense"], np.full(_shape(loaded), _MEASURED_SHARE, np.float32))
    begun = begin_texts(loaded, None, cost_texts)
    costs = group_costs(loaded, begun, norms, named(loaded, half), advance, seed=inputs.seed)
    plan = plan_shares(costs, lost_energies(loaded, scores), group_weights(loaded), measured_at=_MEASURED_SHARE)
    return {"levels": LEVELS, "targets": TARGETS, "plan": plan, **thresholds}


def _thresholds(inputs: ShareInputs, norms: Norms, advance: Advance) -> tuple[dict[str, Any], dict[Groups, Floats]]:
    """Thresholds of the dense FFN and of each cluster, and the scores that the dense FFN's come from."""
    loaded, base = inputs.loaded, TensorFile(inputs.stored.folder / LAYOUT.base)
    dense, found = run_once(dense_cut(loaded, inputs.stored)), {}
    all_text, *own_texts = inputs.texts
    scores = _scores(inputs, dense, 0, dense, all_text, norms)
    found["thresholds.dense"] = thresholds_of(loaded, scores)
    advance()
    for cluster, documents in enumerate(own_texts):
        if inputs.packs is None:
            own = _scores(inputs, dense, 0, dense, documents, norms)
        else:
            own_norms = read_norms(loaded, base, inputs.packs.ffn(cluster))
            own = _scores(inputs, inputs.packs.cut(loaded), cluster, dense, documents, own_norms)
        found[f"thresholds.{cluster}"] = thresholds_of(loaded, own)
        advance()
    return found, scores


def _scores(
    inputs: ShareInputs, cut: Cut, cluster: int, dense: Cut, documents: Sequence[Document], norms: Norms
) -> dict[Groups, Floats]:
    begun = begin_texts(inputs.loaded, dense, documents)
    with ffn_in_use(inputs.loaded, cut, cluster):
        return sample_scores(inputs.loaded, begun, norms, seed=inputs.seed)


def _shape(loaded: LoadedModel) -> tuple[int, int]:
    return loaded.record.num_layers, len(INPUT_GROUPS)


def named(loaded: LoadedModel, values: Floats) -> dict[Groups, float]:
    """Name (layers, 4) values by their groups."""
    return dict(zip(groups_of(loaded), values.flatten().tolist(), strict=True))


def write_token_shares(path: Path, arrays: Arrays, *, with_dense: bool) -> None:
    """Write the file."""
    tensors = {name: StoredTensor("F32", np.asarray(values)) for name, values in arrays.items()}
    if not with_dense:
        del tensors["thresholds.dense"]
    write_tensors(path, tensors)
