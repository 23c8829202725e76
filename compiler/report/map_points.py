"""The report's map: a sample of calibration sentences between their clusters."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.cluster_map import place_texts
from coreinfer.compiler.clusters.cluster import Clustering, map_positions, shorten
from coreinfer.compiler.clusters.route import Routing
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.text.corpus import Document
from sklearn.decomposition import PCA

__all__ = ["MapPoint", "map_points"]

_DEFAULT_SENTENCES = 400
# Fewer than three clusters span no plane: their sentences are spread by what sets them apart within a cluster.
_SPREAD = 0.25


@dataclass(frozen=True, kw_only=True)
class MapPoint:
    """A calibration sentence on the map.

    Attributes:
        x, y: in the units of `ClusterRecord.map_x` and `map_y`.
        text: the sentence, shortened; None where it is not to be shown.
    """

    cluster: int
    x: float
    y: float
    text: str | None


def map_points(config: CompileConfig, routing: Routing, documents: tuple[Document, ...]) -> list[MapPoint]:
    """Place calibration sentences, spread evenly over all different ones.

    Without `report_sentences` at most 400 are placed, and only text of the builtin corpus is shown: whoever passes a
    bundle on need not have meant to pass on the text that it was calibrated on.
    """
    limit = _DEFAULT_SENTENCES if config.report_sentences is None else config.report_sentences
    different = list({document.routing_text: index for index, document in enumerate(documents)}.values())
    sample = [
        different[i] for i in np.unique(np.linspace(0, len(different) - 1, min(limit, len(different))).astype(int))
    ]
    if not sample:
        return []
    places = _places(routing.embeddings[sample], routing.clustering)
    return [
        MapPoint(
            cluster=int(routing.clustering.labels[index]),
            x=round(float(x), 4),
            y=round(float(y), 4),
            text=shorten(documents[index].routing_text) if _is_shown(config, documents[index]) else None,
        )
        for index, (x, y) in zip(sample, places, strict=True)
    ]


def _is_shown(config: CompileConfig, document: Document) -> bool:
    """Only builtin documents have a prompt of their own."""
    return config.report_sentences is not None or document.has_prompt


def _places(embeddings: npt.NDArray[np.float32], clustering: Clustering) -> npt.NDArray[np.float64]:
    centers = map_positions(clustering.centroids)
    places = place_texts(embeddings @ clustering.centroids.T, centers)
    if clustering.num_clusters >= 3 or len(embeddings) < 2:
        return places
    return np.asarray(places + _SPREAD * PCA(n_components=2, svd_solver="full").fit_transform(embeddings))
