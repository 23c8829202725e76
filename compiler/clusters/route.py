"""Stages `embed` and `cluster`: the clusters of the text, and the router that finds them on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.sources import find_encoder
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.narrow import CLUSTERS, Assignment
from coreinfer.compiler.samples import ROUTER_DIMENSION
from coreinfer.compiler.team.team import Team, forget
from coreinfer.compiler.text.corpus import Corpus, Document, split_point

from .cluster import Clustering, class_centroids, cluster_embeddings
from .distil import TOKENS, distill_encoder
from .embed import ENCODER, StaticEncoder, embed_sentences, fit_to_sentences, in_few_dimensions, load_encoder

__all__ = ["Routing", "build_routing", "control_assignments", "route"]

STATIC_MASK = "one static mask"
RANDOM = "random assignment"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Clusters of the calibration text, and the router that finds them for a prompt.

    Attributes:
        clustering: of the calibration documents, by the sentence encoder.
        embeddings: (documents, dimension) of the calibration documents, by the sentence encoder.
        encoder: the static encoder that ships.
        centroids: (clusters, dimension) in the static encoder's space.
        assignment: clusters of all three parts; held-out text is routed as the device will route it.
        distance_p99: 99th percentile of 1 - cosine of text to its nearest centroid; the larger one of calibration and
            validation text.
        agreement: share of held-out texts that both encoders route alike; None without such texts.
        encoder_name: the sentence encoder.
    """

    clustering: Clustering
    embeddings: Floats
    encoder: StaticEncoder
    centroids: Floats
    assignment: Assignment
    distance_p99: float
    agreement: float | None
    encoder_name: str


def build_routing(
    config: CompileConfig,
    clusters: int | Literal["auto"],
    team: Team,
    corpus: Corpus,
    cache: Cache,
    progress: Progress,
) -> Routing:
    """Embed and cluster the calibration text, and fit the static encoder to it.

    Args:
        clusters: how many; that of the options may be left to a search.
    """
    source = find_encoder(config.encoder)
    key, encoder = source.sha256({}), partial(load_encoder, source.absolute(), config.device)
    # The device sees prompts only, so held-out texts are routed by what comes before narrow decoding.
    prompts = [_visible_text(document, team.loaded) for document in corpus.held_out]
    parts = [_routing_texts(corpus.calibration), _routing_texts(corpus.validation), prompts]
    embeddings = embed_sentences(team, encoder, key, [text for part in parts for text in part], cache, progress)
    calibration, validation, held_out = np.split(embeddings, np.cumsum([len(part) for part in parts])[:2])
    clustering = cluster_embeddings(calibration, clusters, seed=config.seed)
    fitted = fit_to_sentences(distill_encoder(team, encoder, key, cache, progress), parts[0], calibration)
    static = in_few_dimensions(fitted, parts[0], ROUTER_DIMENSION)
    for slot in (ENCODER, TOKENS):
        forget(team, "embed", slot)
    static_calibration = static.embed(parts[0])
    centroids = class_centroids(static_calibration, clustering.labels)
    routed = nearest(static.embed(prompts), centroids)
    # The table was fitted to the calibration text, which therefore lies nearer than other text of its kind.
    unseen = static.embed(parts[1])
    return Routing(
        clustering=clustering,
        embeddings=calibration,
        encoder=static,
        centroids=centroids,
        assignment=Assignment(
            name=CLUSTERS,
            calibration=clustering.labels,
            validation=nearest(validation, clustering.centroids),
            held_out=routed,
        ),
        distance_p99=round(max(_distance_p99(static_calibration, centroids), _distance_p99(unseen, centroids)), 5),
        agreement=float(np.mean(routed == nearest(held_out, clustering.centroids))) if len(prompts) else None,
        encoder_name=source.name,
    )


def route(routing: Routing, documents: Sequence[Document]) -> npt.NDArray[np.int64]:
    """Route documents as the device would: (documents,) cluster ids."""
    return nearest(routing.encoder.embed(_routing_texts(documents)), routing.centroids)


def _distance_p99(embeddings: Floats, centroids: Floats) -> float:
    """99th percentile of 1 - cosine to the nearest centroid."""
    return float(np.quantile(1 - (embeddings @ centroids.T).max(axis=1), 0.99)) if len(embeddings) else 0.0


def _routing_texts(documents: Sequence[Document]) -> list[str]:
    return [document.routing_text for document in documents]


def _visible_text(document: Document, loaded: LoadedModel) -> str:
    if document.has_prompt:
        return document.routing_text
    ids = document.token_ids[: split_point(len(document.token_ids))]
    return str(loaded.tokenizer.decode(list(ids), skip_special_tokens=True))


def nearest(embeddings: Floats, centroids: Floats) -> npt.NDArray[np.int64]:
    """Nearest centroid of each embedding by inner product: (texts,)."""
    if not len(embeddings):
        return np.zeros(0, dtype=np.int64)
    return np.asarray((embeddings @ centroids.T).argmax(axis=1), dtype=np.int64)


def control_assignments(assignment: Assignment, *, seed: int) -> tuple[Assignment, ...]:
    """Make the controls: one cluster for all, and clusters of the same sizes with randomly assigned documents."""
    generator = np.random.default_rng(seed)
    num_clusters = int(assignment.calibration.max()) + 1

    def deal(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return generator.permutation(labels)

    static = Assignment(
        name=STATIC_MASK,
        calibration=np.zeros_like(assignment.calibration),
        validation=np.zeros_like(assignment.validation),
        held_out=np.zeros_like(assignment.held_out),
    )
    if num_clusters == 1:
        return (static,)
    random = Assignment(
        name=RANDOM,
        calibration=deal(assignment.calibration),
        validation=deal(assignment.validation),
        held_out=deal(assignment.held_out),
    )
    return (static, random)
