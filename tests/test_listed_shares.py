"""Token shares of packs with fewer experts, each narrower."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import BundleCorrupt, open_bundle
from coreinfer.bundles.contract import kept_experts, tensor_name
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import FfnChoice

from .bundle_factory import change_tensors, edit_manifest
from .engine_inputs import PROMPT
from .skewed_mixtures import NEGLECTED, save_skewed
from .skipping import masking_decoder, skipping_engine

SHARE, NEURONS = 0.6, 96


@pytest.fixture(scope="module")
def listed_shares(tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with shares that were found by a quality, whose packs have some experts in each layer."""
    root = tmp_path_factory.mktemp("listed-shares")
    model = save_skewed(root / "model", "olmoe", intermediate_size=NEURONS)
    given: dict[str, Any] = {"model": str(model), "budgets": None, "output": root / "bundle", "quantize": "int4"}
    options: dict[str, Any] = {"experts": "both", "keep": 0.6, "token_share": "auto", "max_kl": 0.8, "controls": False}
    compile_model(replace(tiny_inputs("olmoe"), clusters=2, **given, **options))
    return root / "bundle"


def test_shares_are_found_by_a_quality(listed_shares: Path) -> None:
    found = read_manifest(listed_shares)
    record = found.token_shares
    assert record is not None
    assert found.lists_experts
    assert all(0.3 <= share < 1 for share in (record.default, *record.clusters))
    planned = record.scores[0]
    assert planned.score.kl < 0.9
    assert planned.read == pytest.approx(record.default, abs=0.1)


def test_generations_read_what_they_want(listed_shares: Path) -> None:
    made = {
        skipping: skipping_engine(listed_shares, skipping).generate(
            PROMPT, raw=True, max_new_tokens=12, mode="similarity", token_share=SHARE
        )
        for skipping in ("on", "masked", "off")
    }
    assert made["on"].token_ids == made["masked"].token_ids
    assert made["on"].token_ids != made["off"].token_ids
    assert [made[skipping].token_share for skipping in ("on", "masked", "off")] == [SHARE, SHARE, 1]
    read = made["on"].bytes_read
    assert read is not None
    assert read.num_tokens == len(made["on"].token_ids) - 1


def renumber(folder: Path, cluster: int, to: Callable[[Iterable[int]], list[int]]) -> None:
    """Give the experts of a pack other numbers."""

    def change(tensors: dict[str, StoredTensor]) -> None:
        for layer in range(3):
            name = tensor_name(layer, "experts")
            old: list[int] = tensors[name].array.tolist()
            new = dict(zip(old, to(old), strict=True))
            tensors[name] = StoredTensor("I32", np.array([*new.values()], dtype=np.int32))
            ids = tensors[tensor_name(layer, "neuron_ids")].array
            moved = np.array([new[number] for number in (ids // NEURONS).tolist()]) * NEURONS + ids % NEURONS
            tensors[tensor_name(layer, "neuron_ids")] = StoredTensor("I32", moved.astype(np.int32))
            own = {key: tensors.pop(key) for key in [*tensors] if key.startswith(f"{name}.")}
            for key, tensor in own.items():
                number, role = key.removeprefix(f"{name}.").split(".", 1)
                tensors[f"{name}.{new[int(number)]}.{role}"] = tensor

    change_tensors(folder, LAYOUT.cluster(cluster), change)


def test_bytes_do_not_depend_on_the_numbers_of_the_experts(listed_shares: Path, tmp_path: Path) -> None:
    """Those of a layer's FFN are counted by one of the experts that it has."""
    folders = [Path(shutil.copytree(listed_shares, tmp_path / name)) for name in ("first", "last")]
    listed = kept_experts(open_bundle(folders[0]).pack(0), open_bundle(folders[0]).manifest)
    assert all(len(kept) < 6 for kept in listed)
    renumber(folders[0], 0, lambda old: [*range(len([*old]))])
    renumber(folders[1], 0, lambda old: [*range(6)][-len([*old]) :])
    found = []
    for folder in folders:
        decoder: NativeDecoder = masking_decoder(open_bundle(folder), columns=True)
        decoder.use(FfnChoice(cluster=0, token_share=SHARE))
        found.append([decoder.weight_bytes(greedy=True, alone=alone) for alone in (True, False)])
        decoder.forward([5])
    assert found[0] == found[1]
    # Columns are filled up to whole tiles, and lie apart.
    assert found[0][0] != found[0][1]


def test_norms_of_an_expert_that_a_pack_lacks_are_named(listed_shares: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(listed_shares, tmp_path / "bundle"))
    absent = next(number for number in NEGLECTED[0] if number not in kept_of(folder, 0))
    name = f"layers.0.experts.{absent}.down_norms"

    def add(tensors: dict[str, StoredTensor]) -> None:
        tensors[name] = StoredTensor("F32", np.ones(NEURONS, dtype=np.float32))

    change_tensors(folder, LAYOUT.cluster(0), add)
    with pytest.raises(BundleCorrupt, match=f"tensor '{name}' is unknown"):
        open_bundle(folder).pack(0)


def kept_of(folder: Path, layer: int) -> list[int]:
    bundle = open_bundle(folder)
    return kept_experts(bundle.pack(0), bundle.manifest)[layer]


def test_thin_clusters_have_no_experts(listed_shares: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(listed_shares, tmp_path / "bundle"))
    with edit_manifest(folder) as data:
        for cluster in data["clusters"]:
            cluster["file"] = None
    with pytest.raises(BundleCorrupt, match=r"manifest\.plan\.experts: both does not go with thin clusters"):
        open_bundle(folder)
