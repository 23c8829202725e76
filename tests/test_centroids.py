"""The index of centroids without FAISS: the same answers, and the same refusals."""

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.runtime.routing import centroids
from coreinfer.runtime.routing.centroids import PlainIndex, read_index, read_plain
from coreinfer.runtime.routing.router import Router

from .model_factory import corpus_texts


def stored(vectors: Any, index: Any = None) -> bytes:
    index = faiss.IndexFlatIP(vectors.shape[1]) if index is None else index
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return bytes(faiss.serialize_index(index))


@pytest.fixture
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(centroids, "find_spec", lambda name: None if name == "faiss" else find(name))


@pytest.mark.parametrize(("num_centroids", "dimension"), [(1, 1), (5, 7), (300, 64)])
def test_it_finds_what_faiss_finds(num_centroids: int, dimension: int) -> None:
    rng = np.random.default_rng(0)
    data = stored(rng.standard_normal((num_centroids, dimension)))
    theirs, ours = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8)), read_plain(data)
    assert (ours.ntotal, ours.d) == (theirs.ntotal, theirs.d)
    texts = rng.standard_normal((50, dimension)).astype(np.float32)
    for count in {1, min(2, num_centroids), num_centroids}:
        (products, ids), (expected, expected_ids) = ours.search(texts, count), theirs.search(texts, count)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(products, expected, atol=1e-5)


def test_equal_centroids_are_found_in_their_order() -> None:
    index = PlainIndex(centroids=np.ones((3, 2), dtype=np.float32))
    assert index.search(np.ones((1, 2), dtype=np.float32), 2)[1].tolist() == [[0, 1]]


def test_texts_route_alike(tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    with_faiss = [Router(bundle).route(text) for text in corpus_texts()[:40]]
    monkeypatch.setattr(centroids, "find_spec", lambda name: None)
    router = Router(bundle)
    for text, route in zip(corpus_texts()[:40], with_faiss, strict=True):
        found = router.route(text)
        assert (found.cluster, found.familiar, found.sure) == (route.cluster, route.familiar, route.sure)
        assert found.distance == pytest.approx(route.distance, abs=1e-6)
    # As far from all clusters, whichever is named.
    assert (router.route("").distance, router.route("").familiar) == (1.0, False)


@pytest.mark.usefixtures("without_faiss")
def test_an_engine_without_faiss(bundle: Path) -> None:
    engine = runtime.load(bundle, threads=1)
    assert isinstance(engine.router._index, PlainIndex)
    assert engine.generate(corpus_texts()[0], max_new_tokens=2).cluster in range(4)


def test_faiss_is_used_where_it_is_there() -> None:
    assert isinstance(read_index(stored(np.eye(3))), faiss.IndexFlatIP)


def test_another_kind_of_index_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a flat index of inner products, got b'IxF2'.*coreinfer\[faiss\]"):
        read_plain(stored(np.eye(3), faiss.IndexFlatL2(3)))


@pytest.mark.parametrize("num_bytes", [0, 1, 40, 44, 60, 80])
def test_a_file_that_was_cut_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        read_plain(stored(np.eye(3))[:num_bytes])


@pytest.mark.parametrize(("dimension", "num_vectors"), [(0, 3), (-3, 3), (3, -3), (4, 3), (3, 1 << 60)])
def test_sizes_that_do_not_fit_are_refused(dimension: int, num_vectors: int) -> None:
    data = bytearray(stored(np.eye(3)))
    struct.pack_into("<iq", data, 4, dimension, num_vectors)
    with pytest.raises(ValueError, match="do not hold"):
        read_plain(bytes(data))
