"""What token shares cost, on text that nothing was set by, beside the controls at the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.manifest import ClusterQuality, Quality, ShareScore
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.narrow import CLUSTERS
from coreinfer.compiler.quality.reference import Reference
from coreinfer.compiler.team.team import Team

from .inputs import group_weights
from .measure import Measured, Part, SharedWeights, measure_parts
from .search import Shares

__all__ = ["ScoredShares", "score_token_shares"]

Floats = npt.NDArray[np.float32]
Weights = Literal["dense", "clusters"]
Kind = Literal["planned", "equal", "one", "random"]
_LABELS: dict[Kind, str] = {
    "planned": "token share",
    "equal": "equal shares",
    "one": "one for all",
    "random": "random clusters",
}


@dataclass(frozen=True, kw_only=True)
class ScoredShares:
    """What was measured.

    Attributes:
        scores: of the shares and of the controls.
        quality: at the shares, where some clusters are thin; None where all have packs, which are scored themselves.
    """

    scores: tuple[ShareScore, ...]
    quality: Quality | None


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One way to decode all texts.

    Attributes:
        asked: share of the layers' bytes, the mean over held-out tokens.
        parts: the texts, by what decodes them.
    """

    weights: Weights
    kind: Kind
    asked: float
    parts: Sequence[Part]


def score_token_shares(
    team: Team,
    reference: Reference,
    shared: SharedWeights,
    shares: Shares,
    num_tokens: Sequence[int],
    *,
    seed: int,
    progress: Progress,
) -> ScoredShares:
    """Measure shares on the reference's texts, with the dense FFN and with the clusters.

    Args:
        num_tokens: (clusters,) held-out tokens of each cluster that are decoded.
        seed: of the control whose texts are dealt to clusters by chance.
    """
    loaded = team.loaded
    shape = (loaded.record.num_layers, len(INPUT_GROUPS))
    rows = [
        *_dense_rows(shared, shares.dense, shape, reference.num_texts),
        *_cluster_rows(shared, shares, num_tokens, shape, seed),
    ]
    flat = [part for row in rows for part in row.parts]
    measured = measure_parts(team, reference, shared, flat, progress)
    sizes, scores, quality = group_weights(loaded), [], None
    for row in rows:
        own, measured = measured[: len(row.parts)], measured[len(row.parts) :]
        scores.append(_score(row, own, sizes))
        if shared.has_thin and row.weights == "clusters" and row.kind == "planned":
            quality = _quality(reference, row, own)
    return ScoredShares(scores=tuple(scores), quality=quality)


def _dense_rows(shared: SharedWeights, share: float, shape: tuple[int, int], num_texts: int) -> list[_Row]:
    def row(kind: Kind, shares: Floats) -> _Row:
        part = Part(ffn=None, thresholds="dense", shares=shares, numbers=tuple(range(num_texts)))
        return _Row(weights="dense", kind=kind, asked=share, parts=(part,))

    return [row("planned", shared.planned(share)), row("equal", np.full(shape, share, dtype=np.float32))]


def _cluster_rows(
    shared: SharedWeights, shares: Shares, num_tokens: Sequence[int], shape: tuple[int, int], seed: int
) -> list[_Row]:
    """Each text by its cluster; the same with equal shares; and where all are thin what clusters add."""
    own = shares.clusters
    asked = round(float(np.average(own, weights=num_tokens if sum(num_tokens) else None)), 4)

    def row(kind: Kind, parts: Sequence[Part]) -> _Row:
        return _Row(weights="clusters", kind=kind, asked=asked, parts=parts)

    def planned(labels: npt.NDArray[np.int64] | None = None) -> list[Part]:
        return [shared.part(c, numbers, shared.planned(own[c])) for c, numbers in shared.members(labels).items()]

    equal = [
        shared.part(cluster, numbers, np.full(shape, own[cluster], dtype=np.float32))
        for cluster, numbers in shared.members().items()
    ]
    rows = [row("planned", planned()), row("equal", equal)]
    if shared.packs is None:
        everything = tuple(range(len(shared.labels)))
        one = Part(ffn=None, thresholds="dense", shares=shared.planned(asked), numbers=everything)
        dealt = np.random.default_rng(seed).permutation(shared.labels)
        rows += [row("one", [one]), row("random", planned(dealt))]
    return rows


def _score(row: _Row, parts: Sequence[Measured], sizes: Floats) -> ShareScore:
    total = Measured()
    for part in parts:
        total.merge(part)
    return ShareScore(
        weights=row.weights,
        shares=row.kind,
        asked=row.asked,
        read=round(total.counts.share(sizes), 4),
        score=total.tally.score(f"{row.weights}, {_LABELS[row.kind]} {row.asked:g}"),
    )


def _quality(reference: Reference, row: _Row, parts: Sequence[Measured]) -> Quality:
    """What a text loses that decodes by its cluster's share."""
    total = Measured()
    for part in parts:
        total.merge(part)
    return Quality(
        dense=reference.dense,
        clusters=total.tally.score(CLUSTERS),
        controls=(),
        per_cluster=tuple(
            ClusterQuality(cluster=int(part.thresholds), score=own.tally.score(f"cluster {part.thresholds}"))
            for part, own in zip(row.parts, parts, strict=True)
        ),
    )
