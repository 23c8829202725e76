"""The router against a computation with numpy, and its files against damage that no checksum can tell."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from coreinfer.runtime.routing.router import UNSURE_MARGIN, Route, Router, lead
from tokenizers import Tokenizer

from .bundle_factory import change_tensors, list_again
from .model_factory import corpus_texts


@pytest.fixture
def bundle_copy(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))


def corruption(bundle_dir: Path) -> str:
    """The one line with which `load` refuses a bundle."""
    with pytest.raises(runtime.BundleCorrupt) as caught:
        runtime.load(bundle_dir, device="cpu", dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    assert str(bundle_dir) in message
    return message


def test_the_nearest_centroid_by_cosine(tiny_bundle: Callable[..., Path]) -> None:
    folder = tiny_bundle("llama")
    router = Router(open_bundle(folder))
    table = TensorFile(folder / LAYOUT.router_table)["table"].array.astype(np.float64)
    tokenizer = Tokenizer.from_file(str(folder / LAYOUT.router_tokenizer))
    index = faiss.read_index(str(folder / LAYOUT.router_index))
    centroids = index.reconstruct_n(0, index.ntotal).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    texts = [*corpus_texts(), "soup", "a judge on a ship", "return the string, captain"]
    routes = [router.route(text) for text in texts]
    for text, route in zip(texts, routes, strict=True):
        mean = table[tokenizer.encode(text, add_special_tokens=False).ids].mean(axis=0)
        cosines = centroids @ (mean / np.linalg.norm(mean))
        assert route.cluster == int(cosines.argmax())
        assert route.distance == pytest.approx(1 - cosines.max(), abs=1e-5)
        np.testing.assert_allclose(router.distances(text), 1 - cosines, atol=1e-5)
        nearest, second = np.sort(router.distances(text))[:2]
        assert route.margin == pytest.approx(1 - nearest / second, abs=1e-6)
    assert {route.cluster for route in routes} == {0, 1, 2, 3}


def test_margins_are_shares_of_the_farther_distance() -> None:
    assert [lead(0.1, 0.4), lead(0.4, 0.4), lead(0.0, 0.0)] == [0.75, 0, 0]
    route = Route(cluster=0, distance=0.1, margin=UNSURE_MARGIN, familiar=True)
    assert route.sure
    assert not replace(route, margin=0.99 * UNSURE_MARGIN).sure


def test_one_cluster_is_always_sure(tiny_bundle: Callable[..., Path]) -> None:
    router = Router(open_bundle(tiny_bundle("llama", clusters=1)))
    for text in (corpus_texts()[0], ""):
        assert (router.route(text).cluster, router.route(text).margin) == (0, 1.0)


def test_topics_have_clusters_of_their_own(tiny_bundle: Callable[..., Path]) -> None:
    router = Router(open_bundle(tiny_bundle("llama")))
    groups = [[router.route(text).cluster for text in corpus_texts()[topic::4]] for topic in range(4)]
    main = [max(set(group), key=group.count) for group in groups]
    assert len(set(main)) == 4
    assert all(group.count(cluster) >= 24 for group, cluster in zip(groups, main, strict=True))


def test_familiar_is_within_the_99th_percentile(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    routes = [Router(bundle).route(text) for text in corpus_texts()]
    assert sum(route.familiar for route in routes) >= 110
    distance = routes[0].distance
    for limit, familiar in ((distance, True), (np.nextafter(distance, -1), False)):
        manifest = replace(bundle.manifest, router=replace(bundle.manifest.router, distance_p99=float(limit)))
        route = Router(replace(bundle, manifest=manifest)).route(corpus_texts()[0])
        assert (route.distance, route.familiar) == (distance, familiar)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_text_without_tokens_is_far_from_all(text: str, tiny_bundle: Callable[..., Path]) -> None:
    route = Router(open_bundle(tiny_bundle("llama"))).route(text)
    assert (route.distance, route.familiar) == (1.0, False)
    assert 0 <= route.cluster < 4


def test_the_same_text_routes_alike_in_any_company(tiny_bundle: Callable[..., Path]) -> None:
    router = Router(open_bundle(tiny_bundle("llama")))
    alone = [Router(open_bundle(tiny_bundle("llama"))).route(text) for text in corpus_texts()[:6]]
    assert [router.route(text) for text in reversed(corpus_texts()[:6])] == alone[::-1]


# Damage with the right checksum


def index_bytes(num_centroids: int, dimension: int) -> bytes:
    index = faiss.IndexFlatIP(dimension)
    vectors = np.eye(num_centroids, dimension, dtype=np.float32)
    index.add(vectors)
    return bytes(faiss.serialize_index(index))


@pytest.mark.parametrize(
    "garbage", [b"", b"x", b"no index at all, just text" * 20, bytes(4096), b"IxFI" + b"\xff" * 60]
)
def test_an_index_that_is_none(garbage: bytes, bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.router_index).write_bytes(garbage)
    list_again(bundle_copy)
    assert "the router cannot be parsed" in corruption(bundle_copy)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_an_index_that_was_cut(share: float, bundle_copy: Path) -> None:
    path = bundle_copy / LAYOUT.router_index
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    list_again(bundle_copy)
    assert "the router cannot be parsed" in corruption(bundle_copy)


@pytest.mark.parametrize(("extra_centroids", "extra_dimensions"), [(1, 0), (-1, 0), (0, 1), (0, -1), (-4, 0)])
def test_an_index_of_another_bundle(extra_centroids: int, extra_dimensions: int, bundle_copy: Path) -> None:
    dimension = open_bundle(bundle_copy).manifest.router.dimension
    wrong = (4 + extra_centroids, dimension + extra_dimensions)
    (bundle_copy / LAYOUT.router_index).write_bytes(index_bytes(*wrong))
    list_again(bundle_copy)
    expected = f"expected 4 centroids of dimension {dimension}, got {wrong[0]} of {wrong[1]}"
    assert re.search(rf"index\.faiss: {expected}", corruption(bundle_copy))


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_router_tokenizer_that_is_none(garbage: bytes, bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.router_tokenizer).write_bytes(garbage)
    list_again(bundle_copy)
    assert "the router cannot be parsed" in corruption(bundle_copy)


@pytest.mark.parametrize("name", ["no table", "flat table"])
def test_a_router_table_that_does_not_fit(name: str, bundle_copy: Path) -> None:
    def change(tensors: dict[str, StoredTensor]) -> None:
        table = tensors.pop("table")
        if name == "no table":
            tensors["rows"] = table
        else:
            tensors["table"] = StoredTensor(table.dtype, table.array.reshape(-1))

    change_tensors(bundle_copy, LAYOUT.router_table, change)
    assert "table.safetensors" in corruption(bundle_copy)
