"""What a compiled bundle holds and says of itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from coreinfer.bundles import open_bundle
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.compiler import CompileConfig

from .model_factory import corpus_texts


def read(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.mark.parametrize("budgets", ["uniform", "energy"])
@pytest.mark.parametrize("keep", [0.34, 0.67])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_clusters_share_budgets_of_whole_blocks(
    family: str, keep: float, budgets: str, tiny_bundle: Callable[..., Path]
) -> None:
    bundle = open_bundle(tiny_bundle(family, keep=keep, budgets=budgets))
    plan = bundle.manifest.plan
    assert sum(plan.layer_budgets) == round(keep * 3 * 96 / 32) * 32
    assert all(budget % 32 == 0 for budget in plan.layer_budgets)
    ids = [[pack[tensor_name(layer, "neuron_ids")].array for layer in range(3)] for pack in bundle.packs]
    assert [[len(layer) for layer in pack] for pack in ids] == [[*plan.layer_budgets]] * len(bundle.packs)
    assert any(not np.array_equal(ids[0][layer], pack[layer]) for pack in ids[1:] for layer in range(3))


@pytest.mark.parametrize("selection", ["coreinfer", "griffin"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_other_selections_make_whole_bundles(
    selection: str, family: str, tiny_bundle: Callable[..., Path], tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    assert tiny_inputs(family).selection == "output-aware"
    bundle = open_bundle(tiny_bundle(family, selection=selection))
    assert bundle.manifest.plan.selection == selection
    assert bundle.manifest.plan.cluster_weight == 1
    ours = open_bundle(tiny_bundle(family)).packs[0]
    name = tensor_name(0, "scores")
    assert not np.allclose(bundle.packs[0][name].array, ours[name].array, atol=0.01)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_dense_writes_no_dense_file(family: str, tiny_bundle: Callable[..., Path]) -> None:
    narrow, whole = tiny_bundle(family, dense=False), tiny_bundle(family)
    assert set(read(whole).files) - set(read(narrow).files) == {"dense.safetensors"}
    bundle = open_bundle(narrow)
    assert bundle.dense is None
    assert not bundle.manifest.plan.dense
    assert (narrow / "clusters" / "000.safetensors").read_bytes() == (
        whole / "clusters" / "000.safetensors"
    ).read_bytes()


def test_the_manifest_says_what_narrowing_costs(tiny_bundle: Callable[..., Path]) -> None:
    manifest = read(tiny_bundle("llama"))
    quality = manifest.quality
    assert quality
    scores = [quality.dense, quality.clusters, *quality.controls]
    assert [score.name for score in scores] == ["dense", "clusters", "one static mask", "random assignment"]
    assert (quality.dense.kl, quality.dense.top1) == (0, 1)
    assert all(score.kl > 0.01 and score.top1 < 1 for score in scores[1:])
    assert len({score.kl for score in scores}) == 4
    assert {(score.num_texts, score.num_tokens) for score in scores} == {(12, quality.dense.num_tokens)}
    assert sum(entry.score.num_tokens for entry in quality.per_cluster) == quality.dense.num_tokens
    assert manifest.router.agreement is not None
    assert manifest.router.num_agreement_sentences == 12


def test_without_evaluation_there_is_no_quality_and_the_packs_stay_the_same(tiny_bundle: Callable[..., Path]) -> None:
    bundle = tiny_bundle("llama", evaluate=False)
    assert read(bundle).quality is None
    name = "clusters/001.safetensors"
    assert (bundle / name).read_bytes() == (tiny_bundle("llama") / name).read_bytes()


def test_without_controls_the_clusters_are_measured_and_stay_the_same(tiny_bundle: Callable[..., Path]) -> None:
    bundle, whole = tiny_bundle("llama", controls=False), tiny_bundle("llama")
    quality, expected = read(bundle).quality, read(whole).quality
    assert quality
    assert expected
    assert (quality.controls, quality.clusters, quality.dense) == ((), expected.clusters, expected.dense)
    name = "clusters/001.safetensors"
    assert (bundle / name).read_bytes() == (whole / name).read_bytes()
    assert "random assignment" not in (bundle / LAYOUT.report).read_text(encoding="utf-8")


def test_one_cluster_has_the_static_control_only(tiny_bundle: Callable[..., Path]) -> None:
    manifest = read(tiny_bundle("llama", clusters=1))
    assert manifest.quality
    assert [score.name for score in manifest.quality.controls] == ["one static mask"]
    assert manifest.quality.controls[0].kl == manifest.quality.clusters.kl


def test_the_manifest_counts_sentences_tokens_and_bytes(
    tiny_bundle: Callable[..., Path], tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    folder = tiny_bundle("llama")
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_inputs("llama").model)
    lengths = {text: len(tokenizer(text).input_ids) for text in corpus_texts()}
    assert sum(cluster.num_sentences for cluster in manifest.clusters) == 96
    assert sum(cluster.num_tokens for cluster in manifest.clusters) < sum(lengths.values())
    examples = [example for cluster in manifest.clusters for example in cluster.examples]
    assert len(examples) == 12
    assert all(any(text.startswith(example.removesuffix("…")) for text in lengths) for example in examples)
    for cluster, pack in zip(manifest.clusters, bundle.packs, strict=True):
        weights = [pack[tensor_name(layer, role)].array for layer in range(3) for role in ("gate", "up", "down")]
        assert cluster.ffn_bytes == sum(array.nbytes for array in weights)
        assert cluster.keep_ratio == pytest.approx(2 / 3, abs=1e-5)


def test_provenance_names_options_but_not_places(
    tiny_bundle: Callable[..., Path], tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    provenance = read(tiny_bundle("llama")).provenance
    assert provenance.config["calibration"] == ["corpus.txt"]
    assert provenance.config["clusters"] == 4
    assert not {"output", "cache_dir", "force"} & set(provenance.config)
    assert provenance.encoder == Path(str(tiny_inputs("llama").encoder)).name
