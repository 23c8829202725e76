"""Mixtures whose experts are narrowed: both engines beside transformers' own model with a pack's repaired experts."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.contract import expert_role, tensor_name
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.mixtures.experts import profile_experts
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.prune.select import choose_neurons, layer_budgets
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.engines.torch.mixture import ExpertRun

from .bundle_factory import change_tensors
from .model_factory import MIXTURES, VOCABULARY, build_model, save_model
from .test_config import make_config
from .test_mixtures import IDS, blocks, close, in_steps, near, pieces

NEURONS = {"mixtral": 96, "qwen3_moe": 72, "olmoe": 128, "granitemoe": 100, "gpt_oss": 104}
"""Of each expert; the last block of 32 is cut short in three."""


def wide_settings(family: str) -> dict[str, Any]:
    """Tiny models' experts have no more neurons than a block, below which nothing is left out."""
    row = family_of_config(build_model(family).config.to_dict(), family)
    assert row.experts is not None
    return {row.experts.dim_field: NEURONS[family]}


@pytest.fixture(scope="module")
def narrow_inputs(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], CompileConfig]:
    """A function (family) that returns the options of a tiny compile with narrow experts."""

    @cache
    def inputs(family: str) -> CompileConfig:
        folder = save_model(tmp_path_factory.mktemp(family), family, **wide_settings(family))
        return replace(tiny_inputs(family), model=str(folder), experts="narrow", clusters=2, budgets=None, keep=0.6)

    return inputs


@pytest.fixture(scope="module")
def narrow_bundle(
    narrow_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function (family, quantize) that compiles each bundle once."""

    @cache
    def written(family: str, quantize: Any = "bf16") -> Path:
        output = tmp_path_factory.mktemp("narrow") / f"{family}-{quantize}"
        compile_model(replace(narrow_inputs(family), output=output, quantize=quantize))
        return output

    return written


def kept_neurons(bundle: Bundle, cluster: int, layer: int) -> list[np.ndarray]:
    """The neurons that each expert has in a pack."""
    ids = bundle.pack(cluster)[tensor_name(layer, "neuron_ids")].array
    dim = bundle.manifest.model.expert_neurons
    return [ids[ids // dim == expert] % dim for expert in range(6)]


def expected_logits(family: str, bundle: Bundle, cluster: int) -> np.ndarray:
    """Logits of transformers' own model with a pack's down projections, in which neurons that it lacks are zero."""
    model, pack = build_model(family, **wide_settings(family)), bundle.pack(cluster)
    row = family_of_config(model.config.to_dict(), family)
    assert row.experts is not None
    for number, layer in enumerate(resolve(model, row.layers)):
        experts = resolve(layer, row.experts.module).experts
        for expert, kept in enumerate(kept_neurons(bundle, cluster, number)):
            assert 0 < len(kept) < NEURONS[family]
            name = tensor_name(number, expert_role(expert, "down"))
            down = experts.down_proj.data[expert]
            columns = torch.zeros(32, NEURONS[family])
            columns[:, torch.from_numpy(kept)] = torch.from_numpy(float_matrix(pack, name, (32, len(kept))))
            down.copy_(columns.T if row.experts.transposed else columns)
            if row.experts.biased:
                bias = pack[tensor_name(number, expert_role(expert, "down_bias"))].array
                experts.down_proj_bias.data[expert] = torch.from_numpy(bias)
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("family", MIXTURES)
def test_torch_computes_a_model_of_such_experts(family: str, narrow_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(narrow_bundle(family))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder.use(DENSE)
    dense = blocks(decoder)
    for cluster in range(2):
        expected = expected_logits(family, bundle, cluster)
        decoder.use(FfnChoice(cluster=cluster))
        np.testing.assert_allclose(blocks(decoder), expected, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(in_steps(decoder), expected[130:], atol=2e-4, rtol=1e-4)
        assert np.abs(expected - dense).max() > 0.1


@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_logits_are_those_of_torch(family: str, narrow_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(narrow_bundle(family))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    for threads in (1, 3):
        decoder = NativeDecoder(bundle, threads=threads)
        # From one width to another and back.
        for cluster in (1, None, 0, 1):
            choice = FfnChoice(cluster=cluster)
            decoder.use(choice)
            torch_decoder.use(choice)
            assert near(blocks(decoder), blocks(torch_decoder))
            expected = pieces(torch_decoder)
            assert close(pieces(decoder), expected, 4e-3)
            assert close(pieces(decoder, 8), expected, 4e-3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_logits_are_those_of_torch(family: str, kind: str, narrow_bundle: Callable[..., Path]) -> None:
    """What differs is the rounding of activations to int8."""
    bundle = open_bundle(narrow_bundle(family, kind))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder = NativeDecoder(bundle, threads=2)
    for cluster in range(2):
        for each in (torch_decoder, decoder):
            each.use(FfnChoice(cluster=cluster))
        assert near(blocks(decoder), blocks(torch_decoder))
        # Routers' sums are as wide as a vector for several tokens, and rounding makes steps of such differences.
        assert close(pieces(decoder, 8), pieces(decoder), 1e-3)


def cut_into(decoder: Decoder, *cuts: int) -> np.ndarray:
    decoder.truncate(0)
    bounds = [0, *cuts, len(IDS)]
    return np.concatenate([decoder.forward(IDS[a:b], all_logits=True) for a, b in itertools.pairwise(bounds)])


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_calls_are_alike(isa: str, kind: str, narrow_bundle: Callable[..., Path]) -> None:
    """To the bit, with any number of threads, however a text is cut, and in rows beside others."""
    bundle = open_bundle(narrow_bundle("granitemoe", kind))
    decoder, other = (NativeDecoder(bundle, threads=threads, isa=isa) for threads in (2, 3))
    for each in (decoder, other):
        each.use(FfnChoice(cluster=1))
    expected = blocks(decoder)
    np.testing.assert_array_equal(blocks(other), expected)
    for cuts in ((2, 5, 12, 44), (40, 48, 65, 100)):
        np.testing.assert_array_equal(cut_into(decoder, *cuts), expected)
    starts = (20, 33, 41, 70)
    alone = []
    for start in starts:
        decoder.truncate(0)
        decoder.forward(IDS[:start])
        alone.append(decoder.forward([IDS[start]])[0])
    sequences = [decoder.add_sequence() for _ in starts]
    for sequence, start in zip(sequences, starts, strict=True):
        decoder.select(sequence)
        decoder.forward(IDS[:start])
    np.testing.assert_array_equal(decoder.forward_rows(sequences, [IDS[start] for start in starts]), np.stack(alone))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_reads_fewer_bytes(family: str, narrow_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(narrow_bundle(family, "int4"))
    decoder, manifest = NativeDecoder(bundle, threads=1), bundle.manifest
    counted = token_bytes(manifest)
    assert manifest.narrows_experts
    assert counted.pack_ffn < 0.75 * counted.dense_ffn
    for cluster in range(2):
        decoder.use(FfnChoice(cluster=cluster))
        difference = counted.pack_ffn - manifest.clusters[cluster].ffn_bytes
        assert decoder.bytes_per_token(0, greedy=True) == counted.pack - difference
    decoder.use(DENSE)
    assert decoder.bytes_per_token(0, greedy=True) == counted.dense


def test_layers_share_neurons_by_what_they_put_out(narrow_bundle: Callable[..., Path]) -> None:
    manifest = open_bundle(narrow_bundle("olmoe")).manifest
    widths = [budget // 6 for budget in manifest.plan.layer_budgets]
    assert all(width % 32 == 0 for width in widths)
    assert sum(widths) == round(0.6 * 3 * 128 / 32) * 32
    text = "\n".join(describe(manifest))
    assert f"budgets    {' '.join(map(str, widths))} of 128 neurons of each expert" in text


def test_more_neurons_cost_less(narrow_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    """And what a search finds is between them."""
    asked: list[dict[str, Any]] = [{"keep": 0.4}, {"keep": None, "max_kl": 0.3}, {"keep": 1.0}]
    losses = []
    for number, options in enumerate(asked):
        config = replace(narrow_inputs("qwen3_moe"), output=tmp_path / str(number), controls=True, **options)
        manifest = compile_model(config)
        assert manifest.quality is not None
        assert {control.name for control in manifest.quality.controls} == {"one static mask", "random assignment"}
        losses.append(manifest.quality.clusters.kl)
    assert losses[0] > losses[1] > losses[2]
    assert losses[1] <= 0.3
    assert losses[2] < 0.01


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_packs_do_without_the_dense_ffn(
    engine: Any, narrow_inputs: Callable[[str], CompileConfig], narrow_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    compile_model(replace(narrow_inputs("olmoe"), output=folder, dense=False))
    made = runtime.load(folder, engine=engine)
    whole = runtime.load(narrow_bundle("olmoe"), engine=engine)
    for each in (made, whole):
        each.decoder.use(FfnChoice(cluster=0))
    np.testing.assert_array_equal(blocks(made.decoder), blocks(whole.decoder))
    prompt = "The kitchen text number 3 speaks of"
    assert made.generate(prompt, mode="similarity", max_new_tokens=5).token_ids
    dense = whole.generate(prompt, mode="dense", max_new_tokens=12)
    assert whole.generate(prompt, mode="lossless", max_new_tokens=12).text == dense.text
    with pytest.raises(ConfigError, match="has no dense FFN"):
        made.decoder.use(DENSE)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A model whose second layer never chooses its last expert."""
    model = build_model("qwen3_moe", **wide_settings("qwen3_moe"))
    family = family_of_config(model.config.to_dict(), "tiny")
    made = wrap_model(model, None, family=family, name="tiny", config=model.config)
    mixture = made.mixture(1)
    tensors = mixture.tensors
    mixture.assign({role: tensor for role, tensor in tensors.items() if not role.startswith("experts.5.")})
    mixture.tensors = tensors
    return made


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Of unlike lengths, so that batches have padding; in clusters 1, 0 and 1."""
    random = np.random.default_rng(0)
    texts = [tuple(random.integers(3, VOCABULARY, length).tolist()) for length in (40, 7, 23)]
    return [Document(text="", routing_text="", token_ids=ids) for ids in texts]


@pytest.fixture(scope="module")
def profile(loaded: LoadedModel, documents: list[Document]) -> Profile:
    labels = {"clusters": np.array([1, 0, 1])}
    config = make_config(experts="narrow")
    return profile_experts(config, Alone(loaded), documents, labels, Cache(None), "key", Progress())


def column_energies(loaded: LoadedModel) -> np.ndarray:
    """Of the second layer's experts: (experts, neurons)."""
    tensors = loaded.mixture(1).tensors
    return np.stack([tensors[expert_role(number, "down")].square().sum(dim=0).numpy() for number in range(6)])


def watched(loaded: LoadedModel, document: Document) -> tuple[np.ndarray, float]:
    """What neurons of the second layer put out: (experts, neurons) sums, and their share of the stream."""
    norms, sums, shares = column_energies(loaded), np.zeros((6, 72)), np.zeros(len(document.token_ids))
    outputs: list[torch.Tensor] = []

    def look(run: ExpertRun) -> None:
        found = (run.activations * run.weights[:, None]).square().numpy() * norms[run.expert]
        sums[run.expert] += found.sum(axis=0)
        shares[run.rows.numpy()] += found.sum(axis=1)

    handle = loaded.layers[1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    loaded.mixture(1).watch = look
    with torch.inference_mode():
        loaded.model(torch.tensor([document.token_ids]))
    loaded.mixture(1).watch = None
    handle.remove()
    stream = outputs[0].reshape(-1, 32).square().sum(dim=-1).numpy()
    return sums, float((shares / stream).sum())


def test_a_profile_sums_what_neurons_put_out(loaded: LoadedModel, documents: list[Document], profile: Profile) -> None:
    expected, energies = np.zeros((2, 6, 72)), 0.0
    for document, label in zip(documents, (1, 0, 1), strict=True):
        sums, share = watched(loaded, document)
        expected[label] += sums
        energies += share
    assert (expected[:, :5].sum(axis=(0, 2)) > 0).all()
    found = profile.statistics["clusters"][:, 1].reshape(2, 6, 72)
    np.testing.assert_allclose(found[:, :5], expected[:, :5], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(profile.relative_energies[1], [energies / 70], rtol=1e-4)


def test_tokens_of_experts_are_counted(loaded: LoadedModel, documents: list[Document], profile: Profile) -> None:
    expected = np.zeros((2, 6))
    for document, label in zip(documents, (1, 0, 1), strict=True):
        loaded.mixture(1).watch = partial(_count, expected[label])
        with torch.inference_mode():
            loaded.model(torch.tensor([document.token_ids]))
    loaded.mixture(1).watch = None
    np.testing.assert_array_equal(profile.expert_tokens["clusters"][:, 1], expected)
    assert expected.sum() == 70 * 2


def _count(counts: np.ndarray, run: ExpertRun) -> None:
    counts[run.expert] += len(run.rows)


def test_experts_with_few_tokens_keep_what_all_clusters_have(profile: Profile) -> None:
    """Neurons go by all text there; elsewhere by the cluster too."""
    config, ones = make_config(experts="narrow", cluster_weight=1.0), np.ones((3, 1), np.float32)
    statistics, num_tokens = profile.statistics["clusters"], profile.num_tokens["clusters"]
    tokens = profile.expert_tokens["clusters"]
    budgets = [[6 * 32] * 3] * 2
    found = choose_neurons(config, statistics, num_tokens, ones, budgets, num_parts=6, part_tokens=tokens)
    own = choose_neurons(config, statistics, num_tokens, ones, budgets, num_parts=6)
    overall = choose_neurons(replace(config, cluster_weight=0.0), statistics, num_tokens, ones, budgets, num_parts=6)
    few = tokens < 32
    assert few.any()
    assert not few.all()
    for cluster, layer, expert in np.ndindex(few.shape):
        part = slice(32 * expert, 32 * (expert + 1))
        expected = (overall if few[cluster, layer, expert] else own).neuron_ids[cluster][layer][part]
        np.testing.assert_array_equal(found.neuron_ids[cluster][layer][part], expected)


def test_each_expert_keeps_as_many(loaded: LoadedModel, profile: Profile) -> None:
    """An expert that nothing chose goes by its columns' norms."""
    config, ones = make_config(experts="narrow", keep=0.5, budgets="energy"), np.ones((3, 1), np.float32)
    budgets = layer_budgets(config, 0.5, profile, ones, record=loaded.record)
    assert all(budget % (6 * 32) == 0 for budget in budgets)
    statistics, num_tokens = profile.statistics["clusters"], profile.num_tokens["clusters"]
    choice = choose_neurons(config, statistics, num_tokens, ones, [budgets, budgets], num_parts=6)
    width = budgets[1] // 6
    for ids in (layers[1] for layers in choice.neuron_ids):
        np.testing.assert_array_equal(ids // 72, np.repeat(np.arange(6), width))
        best = np.argsort(-column_energies(loaded)[5], kind="stable")[:width]
        np.testing.assert_array_equal(ids[-width:] % 72, np.sort(best))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"repair_rounding": True}, "--repair-rounding: experts are repaired on what the dense model sees"),
        ({"carry": True, "heal_steps": 3}, r"2 problems: \(1\) --carry: exp.* \(2\) --heal-steps: experts are not"),
        ({"max_memory": 4.0}, "--max-memory"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_that_do_not_apply_are_refused(
    options: dict[str, Any], named: str, narrow_inputs: Callable[[str], CompileConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"mixture of experts, for which some options do not apply: {named}"):
        compile_model(replace(narrow_inputs("olmoe"), **options))


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_a_budget_of_bytes_is_kept(
    kind: Any, narrow_inputs: Callable[[str], CompileConfig], narrow_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    dense = open_bundle(narrow_bundle("olmoe", kind))
    # Of the three layers' twelve blocks of 32 neurons of each expert four and a half do not fit.
    most = NativeDecoder(dense, threads=1).bytes_per_token(0) - dense.manifest.ffn_bytes * 4.5 / 12
    given: dict[str, Any] = {"keep": None, "budget_mb": most / 1e6, "min_layer_keep": 0.0, "quantize": kind}
    config = replace(narrow_inputs("olmoe"), output=tmp_path / "bundle", evaluate=False, controls=False, **given)
    plan = make_plan(
        config,
        find_inputs(config),
        lambda: Machine(num_threads=1, float32_gflops=1.0, bfloat16_gflops=1.0, read_gbps=1.0),
    )
    assert plan.keep == pytest.approx(7 / 12)
    compile_model(config)
    decoder = NativeDecoder(open_bundle(config.output), threads=1)
    decoder.use(FfnChoice(cluster=0))
    assert most - dense.manifest.ffn_bytes / 12 < decoder.bytes_per_token(0) <= most
    with pytest.raises(ConfigError, match=r"--budget-mb: expected at least .* got 0\.001"):
        compile_model(replace(config, output=tmp_path / "other", budget_mb=0.001))


def test_other_models_have_no_experts(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    with pytest.raises(ConfigError, match="--experts narrow: expected a mixture of experts, and --model llama is none"):
        compile_model(replace(tiny_inputs("llama"), experts="narrow"))


def test_experts_of_unlike_widths_are_named(narrow_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_bundle("mixtral"), tmp_path / "bundle"))

    def move(tensors: dict[str, StoredTensor]) -> None:
        ids = tensors["layers.2.neuron_ids"].array.copy()
        # The first neuron that its first expert lacks takes the place of the second expert's first.
        width = len(ids) // 6
        ids[width] = np.setdiff1d(np.arange(96), ids[:width])[-1]
        tensors["layers.2.neuron_ids"] = StoredTensor("I32", np.sort(ids))

    change_tensors(folder, "clusters/001.safetensors", move)
    with pytest.raises(BundleCorrupt, match=r"layers\.2\.neuron_ids: expected ascending ids below 576, \d+ of each 96"):
        open_bundle(folder).pack(1)


def test_what_a_compile_takes_is_planned(narrow_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    config = replace(narrow_inputs("olmoe"), quantize="int4", budgets="uniform", output=tmp_path / "bundle")
    plan = make_plan(
        config,
        find_inputs(config),
        lambda: Machine(num_threads=1, float32_gflops=1.0, bfloat16_gflops=1.0, read_gbps=1.0),
    )
    manifest = compile_model(config)
    counted = token_bytes(manifest)
    assert (plan.token_bytes_pack, plan.token_bytes_dense) == (counted.pack, counted.dense)
    # 0.6 of 128 neurons are two blocks and a half.
    assert manifest.plan.layer_budgets == (6 * 64,) * 3
    assert plan.keep == 0.5
    packs = sum(record.bytes for name, record in manifest.files.items() if name.startswith("clusters/"))
    dense = manifest.files["dense.safetensors"].bytes
    assert plan.bundle_bytes == pytest.approx(sum(record.bytes for record in manifest.files.values()), rel=0.4)
    # Beside the weights, the numbers of the neurons and the scores of all.
    assert packs == pytest.approx(2 * (0.5 * dense + 3 * 4 * (6 * 64 + 6 * 128)), rel=0.1)


@pytest.mark.parametrize("options", [{}, {"effort": "quick"}, {"reconstruct": False}], ids=str)
def test_stages_that_are_planned_are_those_that_run(
    options: dict[str, Any], narrow_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    config, progress = replace(narrow_inputs("olmoe"), output=tmp_path / "bundle", **options), Progress()
    plan = make_plan(
        config,
        find_inputs(config),
        lambda: Machine(num_threads=1, float32_gflops=1.0, bfloat16_gflops=1.0, read_gbps=1.0),
    )
    planned = {stage.name for stage in plan.stages}
    manifest = compile_model(config, progress=progress)
    assert planned == {*progress.stage_seconds}
    assert ("sensitivity" in planned) == (not options)
    assert ("reconstruct" in planned) == manifest.plan.reconstruct == options.get("reconstruct", True)
    assert all(manifest.plan.ridges) == manifest.plan.reconstruct
