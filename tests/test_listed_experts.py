"""Packs with fewer experts, each narrower: both engines beside transformers' own model with the same experts."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, UnsupportedModelError, manifest
from coreinfer.bundles import open_bundle as opened
from coreinfer.bundles.contract import expert_role, kept_experts, tensor_name
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.routing.modes import ModePlan, decode_choice

from .bundle_factory import change_tensors, edit_manifest
from .model_factory import MIXTURES
from .old_readers import check_older_readers
from .skewed_mixtures import NEGLECTED, build_skewed, skewed_inputs
from .test_export import divergence, exported, model_logits, own_logits, token_ids
from .test_mixtures import IDS, blocks, close, hide_experts, in_steps, pieces
from .test_narrow_experts import (
    NEURONS,
    bf16_is_torch,
    cut_into,
    kept_neurons,
    packed_is_torch,
    put_downs,
    wide_settings,
)
from .test_planning import NEAR


@pytest.fixture(scope="module")
def listed_inputs(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], CompileConfig]:
    """A function (family) that gives the options of a tiny compile whose routers neglect two experts of each layer."""
    root = tmp_path_factory.mktemp("skewed")

    def inputs(family: str) -> CompileConfig:
        return skewed_inputs(tiny_inputs(family), root, family, **wide_settings(family))

    return inputs


@pytest.fixture(scope="module")
def listed(
    listed_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function (family, quantize) that compiles each bundle once."""
    root = tmp_path_factory.mktemp("listed")

    def written(family: str, quantize: Any = "bf16") -> Path:
        output = root / f"{family}-{quantize}"
        if not output.exists():
            compile_model(replace(listed_inputs(family), output=output, quantize=quantize, controls=False))
        return output

    return written


def expected_logits(family: str, bundle: Bundle, cluster: int) -> np.ndarray:
    """Logits of transformers' own model with a pack's experts and neurons alone."""
    model = build_skewed(family, **wide_settings(family))
    put_downs(model, family, bundle, cluster)
    hide_experts(model, kept_experts(bundle.pack(cluster), bundle.manifest))
    return logits_of(model)


def logits_of(model: Any) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("family", MIXTURES)
def test_torch_computes_a_model_of_such_experts(family: str, listed: Callable[..., Path]) -> None:
    bundle = opened(listed(family))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    assert bundle.manifest.lists_experts
    for cluster, record in enumerate(bundle.manifest.clusters):
        numbers = kept_experts(bundle.pack(cluster), bundle.manifest)
        assert [*map(len, numbers)] == list(record.layer_experts or ())
        for layer, kept in enumerate(numbers):
            width = record.layer_budgets[layer] // len(kept)
            assert [len(ids) for ids in kept_neurons(bundle, cluster, layer)] == [width * (n in kept) for n in range(6)]
        decoder.use(FfnChoice(cluster=cluster))
        expected = expected_logits(family, bundle, cluster)
        np.testing.assert_allclose(blocks(decoder), expected, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(in_steps(decoder), expected[130:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_logits_are_those_of_torch(family: str, listed: Callable[..., Path]) -> None:
    bf16_is_torch(opened(listed(family)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_logits_are_those_of_torch(family: str, kind: str, listed: Callable[..., Path]) -> None:
    packed_is_torch(opened(listed(family, kind)), pieces)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_calls_are_alike(isa: str, listed: Callable[..., Path]) -> None:
    """To the bit, with any number of threads, and however a text is cut."""
    bundle = opened(listed("granitemoe", "int4"))
    decoder, other = (NativeDecoder(bundle, threads=threads, isa=isa) for threads in (2, 3))
    for each in (decoder, other):
        each.use(FfnChoice(cluster=1))
    expected = blocks(decoder)
    np.testing.assert_array_equal(blocks(other), expected)
    np.testing.assert_array_equal(cut_into(decoder, 2, 5, 12, 44), expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_bytes_are_those_of_the_manifest(family: str, listed: Callable[..., Path]) -> None:
    bundle = opened(listed(family, "int4"))
    decoder, found = NativeDecoder(bundle, threads=1), bundle.manifest
    counted = token_bytes(found)
    for cluster, record in enumerate(found.clusters):
        decoder.use(FfnChoice(cluster=cluster))
        beside = counted.pack - counted.pack_ffn
        assert decoder.bytes_per_token(0, greedy=True) == beside + record.ffn_bytes
        assert record.ffn_bytes <= found.ffn_bytes
        assert record.keep_ratio == pytest.approx(sum(record.layer_budgets) / (3 * 6 * NEURONS[family]), abs=1e-5)
    decoder.use(DENSE)
    assert decoder.bytes_per_token(0, greedy=True) == counted.dense


@pytest.mark.parametrize("family", MIXTURES)
def test_what_a_cluster_hardly_uses_goes_first(
    family: str, listed: Callable[..., Path], listed_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    """And the others are wider for it: less is lost than by all experts, narrower, that are no smaller together."""
    bundle = opened(listed(family))
    for cluster in range(2):
        for kept, neglected in zip(kept_experts(bundle.pack(cluster), bundle.manifest), NEGLECTED, strict=True):
            assert len(kept) > 4 or not {*kept} & {*neglected}
    config = replace(listed_inputs(family), experts="narrow", output=tmp_path / "narrow", controls=False)
    narrow = compile_model(config)
    most = {"granitemoe": 0.54, "gpt_oss": 0.52}.get(family, 0.5)
    assert all(found.keep_ratio <= 0.5 for found in bundle.manifest.clusters)
    assert all(found.keep_ratio <= most for found in narrow.clusters)
    assert narrow.quality is not None
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.clusters.kl < 0.6 * narrow.quality.clusters.kl


def test_a_quality_is_searched(listed_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    """With controls, which are divided for themselves; a ratio of 1 leaves all experts as they are."""
    asked: list[dict[str, Any]] = [{"keep": 0.3}, {"keep": None, "max_kl": 0.1}, {"keep": 1.0}]
    losses = []
    for number, options in enumerate(asked):
        config = replace(listed_inputs("mixtral"), output=tmp_path / str(number), controls=True, **options)
        found = compile_model(config)
        assert found.quality is not None
        assert {control.name for control in found.quality.controls} == {"one static mask", "random assignment"}
        losses.append(found.quality.clusters.kl)
    assert losses[0] > 0.1 >= losses[1] > losses[2]
    assert losses[2] < 0.01
    assert found.plan.layer_experts == found.clusters[0].layer_experts == (6, 6, 6)
    assert found.plan.layer_budgets == (6 * 96,) * 3


def test_inspection_says_how_many_experts_of_what_width(listed: Callable[..., Path]) -> None:
    found = opened(listed("mixtral")).manifest
    text = "\n".join(describe(found))
    parts: list[manifest.Plan | manifest.ClusterRecord] = [found.plan, *found.clusters]
    for part in parts:
        sizes = zip(part.layer_experts or (), part.layer_budgets, strict=True)
        assert f"budgets {' '.join(f'{count}x{budget // count}' for count, budget in sizes)}" in re.sub(" +", " ", text)
    assert "of 6 experts x 96 neurons" in text
    page = (listed("mixtral") / "report.html").read_text(encoding="utf-8")
    assert "Kept neurons of all experts of 576" in page
    first = (found.plan.layer_experts or ())[0], found.plan.layer_budgets[0]
    assert f"<td>{first[0]}x{first[1] // first[0]}</td>" in page


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_packs_do_without_the_dense_ffn(
    engine: Any, listed_inputs: Callable[[str], CompileConfig], listed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    compile_model(replace(listed_inputs("olmoe"), output=folder, dense=False, controls=False))
    made, whole = runtime.load(folder, engine=engine), runtime.load(listed("olmoe"), engine=engine)
    for each in (made, whole):
        each.decoder.use(FfnChoice(cluster=0))
    np.testing.assert_array_equal(blocks(made.decoder), blocks(whole.decoder))
    prompt = "The kitchen text number 3 speaks of"
    dense = whole.generate(prompt, mode="dense", max_new_tokens=12)
    assert whole.generate(prompt, mode="lossless", max_new_tokens=12).text == dense.text


def zeroed_logits(family: str, neuron_ids: Sequence[np.ndarray]) -> np.ndarray:
    """Logits of transformers' own model with these neurons, and the experts that have any of them."""
    model, size = build_skewed(family, **wide_settings(family)), NEURONS[family]
    row = family_of_config(model.config.to_dict(), family)
    assert row.experts is not None
    for ids, layer in zip(neuron_ids, resolve(model, row.layers), strict=True):
        down = resolve(layer, row.experts.module).experts.down_proj.data
        for expert in range(6):
            absent = np.setdiff1d(np.arange(size), ids - expert * size)
            (down[expert] if row.experts.transposed else down[expert].T)[torch.from_numpy(absent)] = 0
    hide_experts(model, [np.unique(ids // size).tolist() for ids in neuron_ids])
    return logits_of(model)


@pytest.mark.parametrize("mode", ["stability", "fused"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_prompt_chooses_experts_and_neurons_of_its_own(family: str, mode: Any, listed: Callable[..., Path]) -> None:
    bundle = opened(listed(family))
    decoder, native = TorchDecoder(bundle, device="cpu", dtype="float32"), NativeDecoder(bundle, threads=2)
    selection, ids = bundle.manifest.plan.selection, IDS[60:100]
    decoder.use(DENSE)
    statistic = decoder.prompt_statistics(ids, (selection,))[1][selection]
    choice = decode_choice(ModePlan(mode=mode), NEAR, bundle, statistic, len(ids))
    assert choice.neuron_ids is not None
    plan = bundle.manifest.plan
    assert tuple(map(len, choice.neuron_ids)) == plan.layer_budgets
    assert tuple(len(np.unique(own // NEURONS[family])) for own in choice.neuron_ids) == plan.layer_experts
    for each in (decoder, native):
        each.use(choice)
    expected = zeroed_logits(family, choice.neuron_ids)
    np.testing.assert_allclose(blocks(decoder), expected, atol=2e-4, rtol=1e-4)
    assert close(pieces(native), pieces(decoder), 4e-3)
    if mode == "stability":
        # Those that put out most in this prompt stay.
        sums = statistic.reshape(3, 6, -1).astype(np.float64) * np.square(bundle.down_norms).reshape(3, 6, -1)
        for own, energies, count in zip(choice.neuron_ids, sums.sum(axis=2), plan.layer_experts or (), strict=True):
            best = np.sort(np.argsort(-energies, kind="stable")[:count])
            np.testing.assert_array_equal(np.unique(own // NEURONS[family]), best)


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_layers_with_as_many_experts_are_exported(form: str, listed: Callable[..., Path], tmp_path: Path) -> None:
    folder = listed("granitemoe")
    done = exported(folder, tmp_path, form, cluster=1)
    assert opened(folder).manifest.clusters[1].layer_experts == (4, 4, 4)
    if form == "hf":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
        assert model.config.num_local_experts == 4
        assert divergence(own_logits(folder, 1), model_logits(model, token_ids(folder))) < 1e-9
    else:
        assert done.num_bytes
    other = listed("mixtral")
    counts = opened(other).manifest.clusters[1].layer_experts or ()
    assert len({*counts}) > 1
    with pytest.raises(
        UnsupportedModelError, match=f"its layers have {min(counts)} to {max(counts)} .*compile with --experts narrow"
    ):
        exported(other, tmp_path / "out", form, cluster=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budgets": "energy"}, "--budgets energy: layers share by what they lose; expected sensitivity or uniform"),
        ({"repair_rounding": True}, "--repair-rounding: experts are repaired on what the dense model sees"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_that_do_not_apply_are_refused(
    options: dict[str, Any], named: str, listed_inputs: Callable[[str], CompileConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"mixture of experts, for which some options do not apply: {named}"):
        compile_model(replace(listed_inputs("olmoe"), **options))


@pytest.mark.parametrize("options", [{"budgets": "uniform"}, {"reconstruct": False}, {"effort": "quick"}], ids=str)
def test_other_ways_to_narrow(
    options: dict[str, Any], listed_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    config = replace(listed_inputs("olmoe"), output=tmp_path / "bundle", controls=False, **options)
    found = compile_model(config)
    assert all(0.4 < record.keep_ratio <= 0.5 for record in found.clusters)
    if "budgets" in options:
        assert all(budget <= 384 for record in found.clusters for budget in record.layer_budgets)
    assert found.plan.reconstruct == options.get("reconstruct", True)
    assert not manifest_problems(config.output)


def manifest_problems(folder: Path) -> Sequence[str]:
    from coreinfer.bundles.reader import find_problems

    return find_problems(folder, opened(folder).manifest)


def test_older_readers_refuse_by_version(
    listed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(listed("mixtral"), tmp_path / "bundle"))
    assert opened(folder).manifest.schema_version == 7
    said = "manifest.plan.experts: both needs schema_version 7"
    check_older_readers(folder, monkeypatch, known=(2, 3, 4, 5, 6), lower=3, said=said)


def test_numbers_of_experts_that_cannot_be_are_named(listed: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(listed("mixtral"), tmp_path / "bundle"))
    with edit_manifest(folder) as data:
        data["clusters"][0]["layer_experts"] = [1, 7, 5]
        data["clusters"][0]["layer_budgets"][2] = 32
        data["clusters"][1]["layer_experts"] = None
        data["plan"]["layer_experts"] = [4]
    with pytest.raises(BundleCorrupt) as caught:
        opened(folder)
    for problem in (
        "manifest.plan.layer_experts: expected 3 layers, got 1",
        "manifest.clusters[0].layer_experts[0]: expected 2 to 6, got 1",
        "manifest.clusters[0].layer_experts[1]: expected 2 to 6, got 7",
        "manifest.clusters[0].layer_experts[2]: expected 32 neurons in 5 equal parts of 1 to 96",
        "manifest.clusters[1].layer_experts: expected 3 layers, got none",
    ):
        assert problem in str(caught.value)
    with edit_manifest(folder) as data:
        data["plan"]["experts"] = "narrow"
    with pytest.raises(BundleCorrupt, match=re.escape("manifest.plan.layer_experts: unknown")):
        opened(folder)


def test_a_damaged_list_of_experts_is_named(listed: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(listed("mixtral"), tmp_path / "bundle"))
    count = (opened(folder).manifest.clusters[1].layer_experts or ())[0]

    def turn(tensors: dict[str, StoredTensor]) -> None:
        listed = tensors["layers.0.experts"].array
        tensors["layers.0.experts"] = StoredTensor("I32", np.ascontiguousarray(listed[::-1]))

    change_tensors(folder, "clusters/001.safetensors", turn)
    with pytest.raises(BundleCorrupt, match=r"layers\.0\.experts: expected ascending ids below 6"):
        opened(folder)

    def cut(tensors: dict[str, StoredTensor]) -> None:
        tensors["layers.0.experts"] = StoredTensor("I32", np.arange(count - 1, dtype=np.int32))

    change_tensors(folder, "clusters/001.safetensors", cut)
    with pytest.raises(BundleCorrupt, match=rf"tensor 'layers\.0\.experts': expected I32 \[{count}\], got I32"):
        opened(folder)


def test_neurons_of_experts_that_are_not_there_are_named(listed: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(listed("mixtral"), tmp_path / "bundle"))

    def move(tensors: dict[str, StoredTensor]) -> None:
        ids, numbers = tensors["layers.1.neuron_ids"].array.copy(), tensors["layers.1.experts"].array
        absent = np.setdiff1d(np.arange(6), numbers)[0]
        ids[-1] = absent * 96
        tensors["layers.1.neuron_ids"] = StoredTensor("I32", np.sort(ids))

    change_tensors(folder, "clusters/001.safetensors", move)
    with pytest.raises(BundleCorrupt, match=r"layers\.1\.neuron_ids: expected ascending .* of each 96 that it has"):
        opened(folder)


def test_a_pack_has_the_experts_that_it_lists_alone(listed: Callable[..., Path]) -> None:
    bundle = opened(listed("gpt_oss"))
    for cluster in range(2):
        pack = bundle.pack(cluster)
        for layer, kept in enumerate(kept_experts(pack, bundle.manifest)):
            for number in range(6):
                for role in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
                    assert (tensor_name(layer, expert_role(number, role)) in pack) == (number in kept)
