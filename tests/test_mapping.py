from collections import Counter

import numpy as np
import pytest
from coreinfer.bundles.cluster_map import place_texts
from coreinfer.compiler.clusters.cluster import Clustering, class_centroids
from coreinfer.compiler.clusters.embed import StaticEncoder
from coreinfer.compiler.clusters.route import Routing
from coreinfer.compiler.prune.narrow import Assignment
from coreinfer.compiler.report.map_points import map_points
from coreinfer.compiler.text.corpus import Document

from .test_clustering import blobs
from .test_config import make_config

CENTERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])


def test_a_text_lies_near_the_clusters_that_it_is_like() -> None:
    places = place_texts(np.array([[0.9, 0.1, 0.1], [0.4, 0.4, -1.0], [0.2, 0.2, 0.2]]), CENTERS)
    assert np.linalg.norm(places[0]) < 0.01
    np.testing.assert_allclose(places[1], [0.5, 0.0], atol=1e-5)
    np.testing.assert_allclose(places[2], CENTERS.mean(axis=0))


def test_weights_are_exponentials_of_ten_cosines() -> None:
    weights = np.exp(10 * np.array([0.3, 0.1, 0.2]))
    np.testing.assert_allclose(
        place_texts(np.array([[0.3, 0.1, 0.2]]), CENTERS)[0], weights @ CENTERS / weights.sum(), rtol=1e-12
    )


def routing_of(sizes: list[int]) -> Routing:
    embeddings, truth = blobs(sizes, noise=0.3)
    clustering = Clustering(labels=truth, centroids=class_centroids(embeddings, truth))
    return Routing(
        clustering=clustering,
        embeddings=embeddings,
        encoder=StaticEncoder(table=np.zeros((1, 1), dtype=np.float16), tokenizer_json="{}"),
        centroids=clustering.centroids,
        assignment=Assignment(name="clusters", calibration=truth, validation=truth[:0], held_out=truth[:0]),
        distance_p99=0.5,
        agreement=None,
        encoder_name="none",
    )


def documents_of(texts: list[str], *, builtin: bool = False) -> tuple[Document, ...]:
    return tuple(Document(text=text, routing_text=text, token_ids=(1,), has_prompt=builtin) for text in texts)


def test_builtin_text_is_shown_and_given_text_is_not() -> None:
    routing = routing_of([3, 2, 2])
    texts = [f"text {number}" for number in range(7)]
    mixed = documents_of(texts[:3], builtin=True) + documents_of(texts[3:])
    points = map_points(make_config(), routing, mixed)
    assert [point.text for point in points] == [*texts[:3], None, None, None, None]
    assert [point.cluster for point in points] == routing.clustering.labels.tolist()
    asked = map_points(make_config(report_sentences=7), routing, mixed)
    assert [point.text for point in asked] == texts


@pytest.mark.parametrize(("asked", "expected"), [(None, 400), (0, 0), (1, 1), (30, 30), (1000, 900)])
def test_a_bounded_sample_of_different_sentences(asked: int | None, expected: int) -> None:
    routing = routing_of([400, 300, 300])
    documents = documents_of([f"text {number % 900} {'word ' * 100}" for number in range(1000)])
    points = map_points(make_config(report_sentences=asked), routing, documents)
    assert len(points) == expected
    if asked:
        assert len({point.text for point in points}) == min(expected, len(points))
        assert all(len(str(point.text)) <= 160 for point in points)
    if expected > 1:
        shares = Counter(point.cluster for point in points)
        assert shares.keys() == ({0, 1, 2} if expected > 3 else shares.keys())
    assert points == map_points(make_config(report_sentences=asked), routing, documents)


@pytest.mark.parametrize("sizes", [[30], [20, 10]])
def test_few_clusters_are_spread_over_the_plane(sizes: list[int]) -> None:
    points = map_points(make_config(report_sentences=30), routing_of(sizes), documents_of([f"{n}" for n in range(30)]))
    assert len({point.x for point in points}) > 20
    assert len({point.y for point in points}) > 20


def test_a_single_sentence_has_a_place() -> None:
    (point,) = map_points(make_config(report_sentences=1), routing_of([1]), documents_of(["alone"]))
    assert (point.x, point.y) == (0.0, 0.0)
