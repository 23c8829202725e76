"""Thin clusters: what a compile writes of them, what they decode with, and what refuses them."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.token_shares import token_thresholds
from coreinfer.bundles.versions import THIN_VERSION
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.export.chosen import choose_model
from coreinfer.compiler.progress import Progress
from coreinfer.evaluation.subjects import BundleSubject
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.generation import Mode

from .bundle_factory import edit_manifest
from .engine_inputs import PROMPT
from .old_readers import check_older_readers

SHARE = 0.6
PROMPT_IDS, NEXT_IDS = [1, 57, 200, 300, 21, 99, 140, 7], [9, 8, 77, 301]


@pytest.fixture(scope="module")
def thin_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """A function (family, **options) that compiles a bundle of thin clusters."""
    return lambda family="llama", **options: tiny_bundle(
        family, **{"token_share": SHARE, "packs": "thin", "keep": None, "budgets": None, **options}
    )


def test_a_cluster_is_thresholds_and_a_share(thin_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(thin_bundle())
    found = bundle.manifest
    assert find_problems(bundle.path, found) == []
    assert found.schema_version == THIN_VERSION
    assert found.has_thin
    assert not (bundle.path / LAYOUT.clusters).exists()
    assert bundle.packs == ()
    assert [cluster.file for cluster in found.clusters] == [None] * 4
    assert found.mean_pack_bytes == found.ffn_bytes
    own = [token_thresholds(bundle, cluster, 0.5) for cluster in (0, 1, None)]
    assert not np.array_equal(own[0], own[1])
    assert not np.array_equal(own[0], own[2])


def test_clusters_take_next_to_no_space(thin_bundle: Callable[..., Path], tiny_bundle: Callable[..., Path]) -> None:
    few, many = (read_manifest(thin_bundle(clusters=count)) for count in (1, 4))
    sizes = [found.files[LAYOUT.token_shares].bytes for found in (few, many)]
    # Layers, groups and levels, four bytes each, and the tensors' names.
    assert len(many.clusters) > 1
    assert sizes[1] - sizes[0] <= (len(many.clusters) - 1) * (3 * 4 * 33 * 4 + 200)
    own = read_manifest(tiny_bundle("llama", token_share=SHARE))
    assert many.files[LAYOUT.dense].bytes == own.files[LAYOUT.dense].bytes


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_at_share_1_the_text_is_the_dense_models(engine: Any, thin_bundle: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"} if engine == "torch" else {"threads": 1}
    loaded = runtime.load(thin_bundle(quantize="int4"), engine=engine, **options)
    dense = loaded.generate(PROMPT, raw=True, max_new_tokens=12, mode="dense", token_share=1)
    modes: tuple[Mode, ...] = ("similarity", "lossless")
    for mode in modes:
        got = loaded.generate(PROMPT, raw=True, max_new_tokens=12, mode=mode, token_share=1)
        assert got.token_ids == dense.token_ids
        assert (got.mode, got.token_share) == (mode, 1)


def test_a_cluster_decodes_with_the_dense_ffn_by_its_own_thresholds(thin_bundle: Callable[..., Path]) -> None:
    for family in ("llama", "opt"):
        bundle = open_bundle(thin_bundle(family))
        used, plain = (TorchDecoder(bundle, device="cpu", dtype="float32") for _ in range(2))
        for decoder in (used, plain):
            decoder.forward(PROMPT_IDS)
        used.use(FfnChoice(cluster=1, token_share=0.5))
        plain.use(FfnChoice(token_share=0.5))
        plain.masks._thresholds.copy_(used.masks._thresholds)
        for token_id in NEXT_IDS:
            np.testing.assert_array_equal(used.forward([token_id]), plain.forward([token_id]))
        plain.use(FfnChoice(token_share=0.6))
        assert not np.array_equal(used.forward([3]), plain.forward([3]))
        used.use(FfnChoice(cluster=1))
        plain.use(FfnChoice())
        used.truncate(len(PROMPT_IDS))
        plain.truncate(len(PROMPT_IDS))
        np.testing.assert_array_equal(used.forward([5]), plain.forward([5]))


def test_generations_read_their_clusters_share(thin_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(thin_bundle(), tmp_path / "bundle"))
    shares = (0.5, 0.6, 0.7, 0.8)
    with edit_manifest(folder) as data:
        data["token_shares"]["clusters"] = list(shares)
        data["token_shares"]["default"] = 0.9
    engine = runtime.load(folder, engine="torch", device="cpu", dtype="float32")
    got = engine.generate(PROMPT, raw=True, max_new_tokens=4, mode="similarity")
    assert got.token_share == shares[got.cluster]
    assert engine.generate(PROMPT, raw=True, max_new_tokens=4, mode="dense").token_share == 0.9
    assert engine.generate(PROMPT, raw=True, max_new_tokens=4, mode="similarity", token_share=0.4).token_share == 0.4
    subject = BundleSubject(folder, modes=("dense", "similarity", "random", "fused"), engine="torch", dtype="float32")
    assert subject.modes == ("dense", "dense, share 0.9", "similarity, own shares")
    subject.read(PROMPT_IDS, PROMPT)
    subject.begin("similarity, own shares")
    assert subject._choice("similarity, own shares") == FfnChoice(cluster=got.cluster, token_share=got.token_share)


def test_without_gain_all_is_read_and_said(thin_bundle: Callable[..., Path]) -> None:
    """What is measured decides; forced off, a generation says that it read all, and is the dense model's."""
    engine = runtime.load(thin_bundle(quantize="int4"), engine="native", threads=1, input_skipping="off")
    dense = engine.generate(PROMPT, raw=True, max_new_tokens=8, mode="dense")
    got = engine.generate(PROMPT, raw=True, max_new_tokens=8, mode="similarity")
    assert (got.token_share, got.token_ids) == (1, dense.token_ids)
    assert got.bytes_read is None
    on = runtime.load(thin_bundle(quantize="int4"), engine="native", threads=1, input_skipping="on")
    assert on.generate(PROMPT, raw=True, max_new_tokens=8, mode="similarity").token_share == SHARE


def test_what_tokens_read_is_counted(tiny_bundle: Callable[..., Path]) -> None:
    """Of columns that are long enough to be left out, fewer bytes alone than in company."""
    engine = runtime.load(tiny_bundle("llama", token_share=0.5, quantize="int4"), threads=1, input_skipping="on")
    decoder = engine.decoder
    options: dict[str, Any] = {"raw": True, "max_new_tokens": 6}
    alone = engine.generate(PROMPT, mode="similarity", **options)
    read = alone.bytes_read
    assert read is not None
    assert read.num_tokens == len(alone.token_ids) - 1
    decoder.use(FfnChoice(cluster=alone.cluster, token_share=0.5))
    whole = decoder.weight_bytes(greedy=True, alone=False)
    assert whole is not None
    assert 0 < read.mean <= read.p95 <= whole
    together = engine.generate([PROMPT, PROMPT], mode="similarity", **options)
    assert [got.bytes_read and got.bytes_read.mean for got in together] == [whole] * 2
    assert engine.generate(PROMPT, mode="similarity", token_share=1, **options).bytes_read is None
    assert engine.generate(PROMPT, mode="lossless", **options).bytes_read is None


def test_what_needs_packs_is_refused(thin_bundle: Callable[..., Path]) -> None:
    folder = thin_bundle()
    engine = runtime.load(folder, engine="torch", device="cpu", dtype="float32")
    modes: tuple[Mode, ...] = ("stability", "fused")
    for mode in modes:
        with pytest.raises(ConfigError, match=f"mode '{mode}' chooses as many neurons as packs have, and the clusters"):
            engine.generate(PROMPT, raw=True, mode=mode)
    with pytest.raises(ConfigError, match="prompt_ffn: expected dense with this bundle, whose clusters are thin"):
        engine.generate(PROMPT, raw=True, mode="similarity", prompt_ffn="pack")
    with pytest.raises(ConfigError, match="cluster 2 is thin and has no pack"):
        engine.bundle.pack(2)
    with pytest.raises(ConfigError, match="--cluster 1: it is thin, and its weights are the dense FFN's; give --dense"):
        choose_model(folder, cluster=1, dense=False)
    # Long prompts choose neurons of their own where packs are not repaired; here there is none to choose like.
    assert engine.generate(PROMPT * 4, raw=True, max_new_tokens=2, mode="auto").mode in ("similarity", "dense")


def test_options_for_packs_are_refused(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    given = replace(tiny_inputs("llama"), output=tmp_path / "b", keep=None, budgets=None, token_share=0.5, packs="thin")
    for options, named in (
        ({"token_share": None}, "--packs thin: expected --token-share with it"),
        ({"keep": 0.5}, "--keep: with --packs thin nothing is narrowed; leave it out"),
        ({"carry": True, "ridge": 0.1}, "--carry, --ridge: with --packs thin nothing is narrowed; leave them out"),
        ({"dense": False}, "--no-dense: thin clusters decode with the dense FFN"),
        ({"clusters": "auto"}, "--clusters auto: it compares packs"),
        ({"max_kl": 0.1}, "--max-kl, --min-top1: expected --token-share auto with --packs thin, got 0.5"),
        ({"packs": "own", "token_share": "auto"}, "--token-share auto: expected --keep or --budget-mb with it"),
        ({"packs": "both"}, "packs: expected own, thin, auto, got 'both'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(named)):
            replace(given, **options)


def test_older_readers_refuse_by_version(
    thin_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(thin_bundle(), tmp_path / "bundle"))
    said = "clusters[0].file: a cluster without one needs schema_version 4"
    check_older_readers(folder, monkeypatch, known=(2, 3), lower=3, said=said)


def test_nothing_is_narrowed(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    progress = Progress()
    given = replace(tiny_inputs("llama"), keep=None, budgets=None, token_share=SHARE, packs="thin")
    compile_model(replace(given, output=tmp_path / "thin", effort="best"), progress)
    assert not {"profile", "sensitivity", "curves", "reconstruct", "heal"} & {*progress.stage_seconds}
    assert {"shares", "evaluate"} <= {*progress.stage_seconds}


def test_thin_clusters_are_shown(thin_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(thin_bundle())
    record, quality = bundle.manifest.token_shares, bundle.manifest.quality
    assert record is not None
    assert quality is not None
    kinds = [(found.weights, found.shares) for found in record.scores]
    controls = ["planned", "equal", "one", "random"]
    assert kinds == [("dense", "planned"), ("dense", "equal"), *(("clusters", kind) for kind in controls)]
    planned = record.scores[2]
    assert quality.clusters.kl == planned.score.kl
    assert planned.read == pytest.approx(SHARE, abs=0.1)
    assert sum(found.score.num_tokens for found in quality.per_cluster) == planned.score.num_tokens
    lines = "\n".join(describe(bundle.manifest))
    assert "thin" in lines
    assert "clusters, one for all 0.6" in lines
    report = (bundle.path / LAYOUT.report).read_text(encoding="utf-8")
    assert "clusters, random clusters 0.6" in report
    assert "thin" in report
