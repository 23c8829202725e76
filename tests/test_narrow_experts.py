"""Mixtures whose experts are narrowed: both engines beside transformers' own model with a pack's repaired experts."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
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
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.compiler.progress import Progress
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .bundle_factory import change_tensors
from .model_factory import MIXTURES, build_model, save_model
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


def put_downs(model: Any, family: str, bundle: Bundle, cluster: int) -> None:
    """Give transformers' own model a pack's down projections, in which neurons that it lacks are zero."""
    pack = bundle.pack(cluster)
    row = family_of_config(model.config.to_dict(), family)
    assert row.experts is not None
    for number, layer in enumerate(resolve(model, row.layers)):
        experts = resolve(layer, row.experts.module).experts
        for expert, kept in enumerate(kept_neurons(bundle, cluster, number)):
            if len(kept) == 0:
                continue
            name = tensor_name(number, expert_role(expert, "down"))
            down = experts.down_proj.data[expert]
            columns = torch.zeros(32, NEURONS[family])
            columns[:, torch.from_numpy(kept)] = torch.from_numpy(float_matrix(pack, name, (32, len(kept))))
            down.copy_(columns.T if row.experts.transposed else columns)
            if row.experts.biased:
                bias = pack[tensor_name(number, expert_role(expert, "down_bias"))].array
                experts.down_proj_bias.data[expert] = torch.from_numpy(bias)


def expected_logits(family: str, bundle: Bundle, cluster: int) -> np.ndarray:
    """Logits of transformers' own model with a pack's neurons."""
    model = build_model(family, **wide_settings(family))
    for number in range(3):
        assert all(0 < len(kept) < NEURONS[family] for kept in kept_neurons(bundle, cluster, number))
    put_downs(model, family, bundle, cluster)
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


def bf16_is_torch(bundle: Bundle) -> None:
    """Check that the native engine's logits are torch's, from one width to another and back."""
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    for threads in (1, 3):
        decoder = NativeDecoder(bundle, threads=threads)
        for cluster in (1, None, 0, 1):
            choice = FfnChoice(cluster=cluster)
            decoder.use(choice)
            torch_decoder.use(choice)
            assert near(blocks(decoder), blocks(torch_decoder))
            expected = pieces(torch_decoder)
            assert close(pieces(decoder), expected, 4e-3)
            assert close(pieces(decoder, 8), expected, 4e-3)


def packed_is_torch(bundle: Bundle, read: Callable[[Decoder], np.ndarray]) -> None:
    """Check the same of int4 or int8; what differs is the rounding of activations to int8."""
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder = NativeDecoder(bundle, threads=2)
    for cluster in range(2):
        for each in (torch_decoder, decoder):
            each.use(FfnChoice(cluster=cluster))
        assert near(read(decoder), read(torch_decoder))
        # Routers' sums are as wide as a vector for several tokens, and rounding makes steps of such differences.
        assert close(pieces(decoder, 8), pieces(decoder), 1e-3)


@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_logits_are_those_of_torch(family: str, narrow_bundle: Callable[..., Path]) -> None:
    bf16_is_torch(open_bundle(narrow_bundle(family)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_logits_are_those_of_torch(family: str, kind: str, narrow_bundle: Callable[..., Path]) -> None:
    packed_is_torch(open_bundle(narrow_bundle(family, kind)), blocks)


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


@pytest.mark.parametrize("options", [{}, {"effort": "quick"}, {"effort": "best"}, {"reconstruct": False}], ids=str)
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
    assert ("sensitivity" in planned) == (manifest.plan.reconstruct and options.get("effort") != "quick")
    assert ("reconstruct" in planned) == manifest.plan.reconstruct == options.get("reconstruct", True)
    assert all(manifest.plan.ridges) == manifest.plan.reconstruct
