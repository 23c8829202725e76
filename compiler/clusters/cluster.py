"""Cluster calibration text by meaning."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import silhouette_score

__all__ = [
    "Clustering",
    "class_centroids",
    "cluster_embeddings",
    "label_clusters",
    "map_positions",
    "shorten",
    "typical_texts",
]

_log = logging.getLogger(__name__)
_AUTO_CANDIDATES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_AUTO_SAMPLE = 2000
_MIN_SHARE_OF_MEAN = 0.2
_NUM_LABEL_WORDS = 3
_NUM_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 160

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Which sentence belongs to which cluster.

    Attributes:
        labels: (sentences,) cluster of each sentence; larger clusters come first.
        centroids: (clusters, dimension), rows of L2 norm 1.
    """

    labels: Labels
    centroids: Floats

    @property
    def num_clusters(self) -> int:
        """How many clusters there are."""
        return len(self.centroids)


def cluster_embeddings(embeddings: Floats, num_clusters: int | str, *, seed: int) -> Clustering:
    """Cluster by spherical k-means; empty and tiny clusters are merged into their nearest one, and this is logged.

    Args:
        embeddings: (sentences, dimension), rows of L2 norm 1.
        num_clusters: how many, or "auto" for the number with the best silhouette over a sample.
    """
    if num_clusters == "auto":
        return _best_silhouette(embeddings, seed)
    labels = _spherical_kmeans(embeddings, int(num_clusters), seed)
    return _merge_tiny(embeddings, labels, int(num_clusters))


def _best_silhouette(embeddings: Floats, seed: int) -> Clustering:
    candidates = [k for k in _AUTO_CANDIDATES if k * 4 <= len(embeddings)] or [1]
    scores: dict[int, float] = {}
    for k in candidates:
        labels = _merge_tiny(embeddings, _spherical_kmeans(embeddings, k, seed), k).labels
        if len(set(labels.tolist())) > 1:
            sample = min(_AUTO_SAMPLE, len(embeddings))
            scores[k] = float(
                silhouette_score(embeddings, labels, metric="cosine", sample_size=sample, random_state=seed)
            )
    best = max(scores, key=lambda k: scores[k], default=1)
    listed = ", ".join(f"{k}: {score:.3f}" for k, score in scores.items())
    _log.info("clusters auto: %d by silhouette (%s)", best, listed)
    return cluster_embeddings(embeddings, best, seed=seed)


def _spherical_kmeans(embeddings: Floats, k: int, seed: int) -> Labels:
    if k == 1:
        return np.zeros(len(embeddings), dtype=np.int64)
    kmeans = faiss.Kmeans(
        embeddings.shape[1], k, niter=50, nredo=8, spherical=True, seed=seed + 1, min_points_per_centroid=1
    )
    kmeans.train(np.ascontiguousarray(embeddings))
    _, labels = kmeans.index.search(np.ascontiguousarray(embeddings), 1)
    return np.asarray(labels[:, 0], dtype=np.int64)


def _merge_tiny(embeddings: Floats, labels: Labels, num_asked: int) -> Clustering:
    """Dissolve clusters far below the mean size, smallest first, then number the rest by size."""
    least = max(2, int(_MIN_SHARE_OF_MEAN * len(labels) / num_asked))
    while True:
        sizes = np.bincount(labels)
        used = np.flatnonzero(sizes)
        smallest = used[np.argmin(sizes[used])]
        if len(used) == 1 or sizes[smallest] >= min(least, len(labels) // num_asked or 1):
            break
        centroids = _centroids(embeddings, labels, used)
        others = used != smallest
        members = np.flatnonzero(labels == smallest)
        labels = labels.copy()
        labels[members] = used[others][np.argmax(embeddings[members] @ centroids[others].T, axis=1)]
    if len(used) < num_asked:
        _log.warning("clusters: %d asked for, %d kept; empty and tiny ones were merged", num_asked, len(used))
    by_size = used[np.argsort(-sizes[used], kind="stable")]
    new_number = np.full(len(sizes), -1, dtype=np.int64)
    new_number[by_size] = np.arange(len(by_size))
    labels = new_number[labels]
    return Clustering(labels=labels, centroids=_centroids(embeddings, labels, np.arange(len(used))))


def _centroids(embeddings: Floats, labels: Labels, ids: npt.NDArray[np.int64]) -> Floats:
    means = np.stack([embeddings[labels == cluster].mean(axis=0) for cluster in ids])
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def class_centroids(embeddings: Floats, labels: Labels) -> Floats:
    """Mean directions of labelled sentences: (clusters, dimension), rows of L2 norm 1."""
    return _centroids(embeddings, labels, np.arange(int(labels.max()) + 1))


def label_clusters(texts: Sequence[str], labels: Labels) -> list[str]:
    """Label each cluster by the words that are most typical of it, by tf-idf over clusters.

    A word counts once per text, so that one long text does not name its cluster.
    """
    num_clusters = int(labels.max()) + 1
    vectorizer: Any = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{3,}\b", sublinear_tf=True)
    analyze = vectorizer.build_analyzer()
    joined = ["" for _ in range(num_clusters)]
    for text, label in zip(texts, labels, strict=True):
        joined[label] += " " + " ".join(sorted(set(analyze(text))))
    if not any(part.strip() for part in joined):
        return [f"cluster {cluster}" for cluster in range(num_clusters)]
    weights = vectorizer.fit_transform(joined).toarray()
    words = vectorizer.get_feature_names_out()
    labels_text = []
    for cluster, row in enumerate(weights):
        top = [words[i] for i in np.argsort(-row, kind="stable")[:_NUM_LABEL_WORDS] if row[i] > 0]
        labels_text.append(", ".join(top) or f"cluster {cluster}")
    return labels_text


def typical_texts(texts: Sequence[str], embeddings: Floats, clustering: Clustering) -> list[tuple[str, ...]]:
    """Shorten the sentences nearest to each centroid."""
    found = []
    for cluster, centroid in enumerate(clustering.centroids):
        members = np.flatnonzero(clustering.labels == cluster)
        nearest = members[np.argsort(-(embeddings[members] @ centroid), kind="stable")]
        shortened = dict.fromkeys(shorten(texts[i]) for i in nearest)
        found.append(tuple(shortened)[:_NUM_EXAMPLES])
    return found


def shorten(text: str) -> str:
    """Put a sentence on one line of at most 160 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXAMPLE_CHARACTERS else flat[: _EXAMPLE_CHARACTERS - 1].rstrip() + "…"


def map_positions(centroids: Floats) -> npt.NDArray[np.float64]:
    """Project centroids to two dimensions for the report's map: (clusters, 2)."""
    if len(centroids) < 3:
        return np.array([[float(i), 0.0] for i in range(len(centroids))])
    positions = PCA(n_components=2, svd_solver="full").fit_transform(centroids.astype(np.float64))
    return np.asarray(np.round(positions, 4), dtype=np.float64)
