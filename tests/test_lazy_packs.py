"""Packs that are hashed when they are first used."""

from collections.abc import Callable
from pathlib import Path

import pytest
from coreinfer.bundles import open_bundle
from coreinfer.bundles.contract import cluster_tensors
from coreinfer.bundles.errors import BundleCorrupt

from .bundle_factory import change_tensors, edit_manifest, flip_bit
from .test_reader import PACKS, bad_ids, truncate


@pytest.mark.parametrize("kind", ["bf16", "int4", "int8"])
def test_lazily_opened_packs_are_those_of_the_bundle(kind: str, make_bundle: Callable[..., Path]) -> None:
    bundle_dir = make_bundle(ffn_format=kind)
    lazy, eager = open_bundle(bundle_dir, lazy_packs=True), open_bundle(bundle_dir)
    assert not eager.unchecked
    for cluster in (1, 0, 1):
        assert {*lazy.pack(cluster)} == {*eager.pack(cluster)} == {*cluster_tensors(lazy.manifest, cluster)}
        assert lazy.pack(cluster) is lazy.packs[cluster]
    assert not lazy.unchecked


def test_a_lazily_opened_pack_is_hashed_when_it_is_used(bundle_dir: Path) -> None:
    flip_bit(bundle_dir / PACKS[1])
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    bundle.pack(0)
    for _ in range(2):
        with pytest.raises(BundleCorrupt, match=rf"{PACKS[1]}: expected sha256 .*, got .*; copy or compile") as caught:
            bundle.pack(1)
        assert "\n" not in str(caught.value)
    bundle.pack(0)


def test_a_pack_is_hashed_once(bundle_dir: Path) -> None:
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    bundle.pack(1)
    (bundle_dir / PACKS[1]).unlink()
    assert len(bundle.pack(1))


def test_a_lazily_opened_pack_has_its_neuron_ids_checked(bundle_dir: Path) -> None:
    change_tensors(bundle_dir, PACKS[1], bad_ids(position=10, value=9))
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    with pytest.raises(BundleCorrupt, match="neuron_ids: expected ascending ids"):
        bundle.pack(1)


def test_everything_else_is_checked_at_once(bundle_dir: Path) -> None:
    flip_bit(bundle_dir / "base.safetensors")
    truncate(bundle_dir / PACKS[0])
    change_tensors(bundle_dir, PACKS[1], lambda tensors: tensors.pop("layers.1.up"), listed=False)
    with edit_manifest(bundle_dir) as data:
        data["files"][PACKS[1]]["bytes"] = (bundle_dir / PACKS[1]).stat().st_size
    with pytest.raises(BundleCorrupt) as caught:
        open_bundle(bundle_dir, lazy_packs=True)
    message = str(caught.value)
    assert "base.safetensors: expected sha256" in message
    assert f"{PACKS[0]}: expected" in message
    assert f"{PACKS[1]}: tensor 'layers.1.up' is missing" in message


def test_without_checksums_packs_are_not_hashed_later_either(bundle_dir: Path) -> None:
    flip_bit(bundle_dir / PACKS[1])
    open_bundle(bundle_dir, checksums=False, lazy_packs=True).pack(1)
