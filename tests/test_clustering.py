import logging

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.compiler.clusters.cluster import (
    Clustering,
    class_centroids,
    cluster_embeddings,
    label_clusters,
    map_positions,
    typical_texts,
)

from .model_factory import corpus_texts

TOPICS = ("kitchen", "code", "sea", "law")
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def blobs(sizes: list[int], *, noise: float = 0.05, dimension: int = 24, seed: int = 0) -> tuple[Floats, Labels]:
    """Unit vectors around orthogonal directions, shuffled, and the blob of each."""
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(generator.normal(size=(dimension, dimension)))[0][: len(sizes)]
    truth = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = directions[truth] + noise * generator.normal(size=(len(truth), dimension))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float32), truth


def same_partition(first: Labels, second: Labels) -> bool:
    pairs = {*zip(first.tolist(), second.tolist(), strict=True)}
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [[30, 30, 30, 30], [40, 25, 15, 12, 10], [50, 20]])
def test_separated_blobs_are_found_and_numbered_by_size(sizes: list[int], seed: int) -> None:
    embeddings, truth = blobs(sizes, seed=seed)
    clustering = cluster_embeddings(embeddings, len(sizes), seed=seed)
    assert same_partition(clustering.labels, truth)
    assert np.bincount(clustering.labels).tolist() == sorted(sizes, reverse=True)
    for cluster in range(clustering.num_clusters):
        mean = embeddings[clustering.labels == cluster].mean(axis=0)
        np.testing.assert_allclose(clustering.centroids[cluster], mean / np.linalg.norm(mean), atol=1e-6)


def test_the_same_seed_gives_the_same_clusters() -> None:
    embeddings, _ = blobs([60], noise=1.0)
    first, second = (cluster_embeddings(embeddings, 6, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    other = cluster_embeddings(embeddings, 6, seed=4)
    assert not same_partition(other.labels, first.labels)


def test_one_cluster_holds_all() -> None:
    embeddings, _ = blobs([10, 10])
    clustering = cluster_embeddings(embeddings, 1, seed=0)
    assert clustering.labels.tolist() == [0] * 20
    assert clustering.centroids.shape == (1, 24)
    np.testing.assert_allclose(np.linalg.norm(clustering.centroids[0]), 1, atol=1e-6)


def test_tiny_clusters_go_to_their_nearest_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    embeddings, truth = blobs([60, 60, 60])
    # Two strays near blob 1, far below a fifth of the mean size 45.
    stray = embeddings[truth == 1][0] + 3 * np.eye(24, dtype=np.float32)[23]
    strays = np.stack([stray, stray]) / np.linalg.norm(stray)
    everything = np.concatenate([embeddings, strays]).astype(np.float32)
    clustering = cluster_embeddings(everything, 4, seed=0)
    assert clustering.num_clusters == 3
    assert same_partition(clustering.labels[:180], truth)
    nearest = clustering.centroids @ strays[0]
    assert clustering.labels[180:].tolist() == [int(nearest.argmax())] * 2
    assert "4 asked for, 3 kept" in caplog.text


def test_all_clusters_of_a_fair_size_stay(caplog: pytest.LogCaptureFixture) -> None:
    embeddings, _ = blobs([60, 60, 20])
    assert cluster_embeddings(embeddings, 3, seed=0).num_clusters == 3
    assert not caplog.records


def test_equal_sentences_cannot_be_parted(caplog: pytest.LogCaptureFixture) -> None:
    embeddings = np.tile(blobs([1])[0], (12, 1))
    clustering = cluster_embeddings(embeddings, 3, seed=0)
    assert clustering.labels.tolist() == [0] * 12
    assert "3 asked for, 1 kept" in caplog.text


def test_as_many_clusters_as_sentences() -> None:
    embeddings, _ = blobs([1] * 6)
    clustering = cluster_embeddings(embeddings, 6, seed=0)
    assert sorted(clustering.labels.tolist()) == list(range(6))


@pytest.mark.parametrize("num_blobs", [2, 3, 4, 6, 8])
def test_auto_finds_the_number_of_blobs(num_blobs: int, caplog: pytest.LogCaptureFixture) -> None:
    embeddings, truth = blobs([25] * num_blobs)
    with caplog.at_level(logging.INFO, logger="coreinfer.compiler.clusters.cluster"):
        clustering = cluster_embeddings(embeddings, "auto", seed=0)
    assert same_partition(clustering.labels, truth)
    assert f"clusters auto: {num_blobs} by silhouette" in caplog.text


@pytest.mark.parametrize("num_texts", [1, 3, 7])
def test_auto_of_few_sentences_is_one_cluster(num_texts: int) -> None:
    embeddings, _ = blobs([num_texts], noise=1.0)
    assert cluster_embeddings(embeddings, "auto", seed=0).labels.tolist() == [0] * num_texts


def topic_labels() -> Labels:
    return np.array([TOPICS.index(text.split()[1]) for text in corpus_texts()])


def test_labels_are_words_of_the_topic() -> None:
    texts = corpus_texts()
    for topic, label in zip(TOPICS, label_clusters(texts, topic_labels()), strict=True):
        words = label.split(", ")
        assert len(words) == 3
        own = {word.strip(".") for text in texts if text.split()[1] == topic for word in text.lower().split()}
        others = {word.strip(".") for text in texts if text.split()[1] != topic for word in text.lower().split()}
        assert set(words) <= own - others


def test_one_long_text_does_not_name_its_cluster() -> None:
    texts = ["zebra " * 500, "apple pear", "apple pear plum", "apple plum", "engine wheel", "engine wheel"]
    labels = label_clusters(texts, np.array([0, 0, 0, 0, 1, 1]))
    assert labels[0].split(", ")[0] == "apple"
    assert labels[1] == "engine, wheel"


@pytest.mark.parametrize("texts", [["12 34", "!!!"], ["the and of", "to in"], ["", " "]])
def test_texts_without_words_are_numbered(texts: list[str]) -> None:
    assert label_clusters(texts, np.array([0, 1])) == ["cluster 0", "cluster 1"]


def test_a_cluster_without_words_beside_one_with_words() -> None:
    assert label_clusters(["engine", "42"], np.array([0, 1])) == ["engine", "cluster 1"]


def test_words_of_any_script_make_labels() -> None:
    labels = label_clusters(["Düsenflugzeug über Köln", "лошадь бежит"], np.array([0, 1]))
    assert "düsenflugzeug" in labels[0]
    assert "лошадь" in labels[1]


def test_typical_texts_are_the_members_nearest_to_the_centroid() -> None:
    embeddings, truth = blobs([12, 8], noise=0.3)
    texts = [f"text {number}" for number in range(20)]
    centroids = class_centroids(embeddings, truth)
    found = typical_texts(texts, embeddings, Clustering(labels=truth, centroids=centroids))
    for cluster in range(2):
        members = [int(i) for i in np.flatnonzero(truth == cluster)]
        nearest = sorted(members, key=lambda i: -float(embeddings[i] @ centroids[cluster]))
        assert found[cluster] == tuple(texts[i] for i in nearest[:3])


def test_typical_texts_are_short_flat_and_different() -> None:
    embeddings = np.ones((4, 1), dtype=np.float32)
    clustering = Clustering(labels=np.zeros(4, dtype=np.int64), centroids=np.ones((1, 1), dtype=np.float32))
    texts = ["two\n\n  lines", "two lines", "word " * 100, "x" * 160]
    (found,) = typical_texts(texts, embeddings, clustering)
    assert found[0] == "two lines"
    assert found[1].startswith("word word")
    assert found[1].endswith("…")
    assert found[2] == "x" * 160
    assert all(len(text) <= 160 for text in found)


@pytest.mark.parametrize("num_clusters", [1, 2, 3, 9])
def test_map_positions_keep_clusters_apart(num_clusters: int) -> None:
    centroids, _ = blobs([1] * num_clusters)
    positions = map_positions(centroids)
    assert positions.shape == (num_clusters, 2)
    assert len({tuple(position) for position in positions.tolist()}) == num_clusters
    np.testing.assert_array_equal(positions, map_positions(centroids))
