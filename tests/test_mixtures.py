"""Mixtures of experts: compiled from tiny random models, and run by both engines beside transformers' own."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import BundleCorrupt, ConfigError, UnsupportedModelError, open_bundle
from coreinfer.bundles.contract import kept_experts
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.manifest import ExpertsRecord
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.compiler.expert_options import with_expert_options
from coreinfer.compiler.models.load import read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.compiler.prune.mixtures.experts import expert_budgets
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .bundle_factory import change_tensors, edit_manifest
from .model_factory import MIXTURES, VOCABULARY, build_model, save_model
from .test_checkpoint import change_json

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 150).tolist()
"""Longer than the sliding windows of the tiny models."""


def hide_experts(model: Any, keep: list[list[int]]) -> None:
    """Make router logits of all experts minus infinity but for those that are kept of each layer."""
    row = family_of_config(model.config.to_dict(), "tiny")
    assert row.experts is not None
    for layer, kept in zip(resolve(model, row.layers), keep, strict=True):
        router = resolve(layer, f"{row.experts.module}.{row.experts.router}")
        weight, absent = router.weight.data, [number for number in range(6) if number not in kept]
        # One more input, which is 1, so that the router's own code makes use of it.
        bias = torch.zeros(6).index_fill(0, torch.tensor(absent, dtype=torch.long), -1e9)
        router.weight.data, router.hidden_dim = torch.cat([weight, bias[:, None]], dim=1), weight.shape[1] + 1
        router.register_forward_pre_hook(
            lambda _, inputs: (torch.nn.functional.pad(inputs[0].reshape(-1, inputs[0].shape[-1]), (0, 1), value=1.0),)
        )


def reference_logits(family: str, *, keep: list[list[int]] | None = None) -> np.ndarray:
    """Logits of transformers' own model; with `keep`, router logits of all other experts are minus infinity."""
    model = build_model(family)
    if keep is not None:
        hide_experts(model, keep)
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def token_errors(got: Any, expected: Any) -> Any:
    """Of each token's logits, (..., tokens), beside the size of all."""
    return np.sqrt(np.square(got - expected).mean(axis=-1) / np.square(expected).mean())


def near(got: Any, expected: Any) -> bool:
    """Whether most tokens are about right: rounding makes another expert the better one here and there."""
    return float(np.median(token_errors(got, expected))) < 0.1


def close(got: Any, expected: Any, most: float) -> bool:
    """Whether most of many short texts have the expected logits (see `pieces`).

    A token that goes to another expert changes all tokens after it: in one long text, most of them.
    """
    assert got.shape[:2] == (12, 12)
    return float(np.quantile(token_errors(got, expected).max(axis=1), 0.6)) < most


def pieces(decoder: Decoder, num_at_once: int = 12) -> Any:
    """Logits of 12 texts of 12 tokens, the last of which are read one by one."""
    logits = []
    for start in range(0, 144, 12):
        ids = IDS[start : start + 12]
        decoder.truncate(0)
        logits.append(decoder.forward(ids[:num_at_once], all_logits=True))
        logits.extend(decoder.forward([token_id]) for token_id in ids[num_at_once:])
    return np.concatenate(logits).reshape(12, 12, -1)


def blocks(decoder: Decoder) -> Any:
    decoder.truncate(0)
    return decoder.forward(IDS, all_logits=True)


def in_steps(decoder: Decoder, start: int = 130) -> Any:
    """Logits of the tokens after `start`, read one by one after a block."""
    decoder.truncate(0)
    decoder.forward(IDS[:start])
    return np.concatenate([decoder.forward([token_id]) for token_id in IDS[start:]])


@pytest.mark.parametrize("family", MIXTURES)
def test_torch_computes_what_transformers_does(family: str, tiny_bundle: Callable[..., Path]) -> None:
    engine = runtime.load(tiny_bundle(family), device="cpu", dtype="float32", engine="torch")
    engine.decoder.use(DENSE)
    expected = reference_logits(family)
    np.testing.assert_allclose(blocks(engine.decoder), expected, atol=2e-4, rtol=1e-4)
    for cluster, pack in enumerate(engine.bundle.packs):
        keep = kept_experts(pack, engine.manifest)
        assert [len(experts) for experts in keep] == [4, 4, 4]
        engine.decoder.use(FfnChoice(cluster=cluster))
        narrow = reference_logits(family, keep=keep)
        np.testing.assert_allclose(blocks(engine.decoder), narrow, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(in_steps(engine.decoder), narrow[130:], atol=2e-4, rtol=1e-4)
        assert np.abs(narrow - expected).max() > 0.1


@pytest.mark.parametrize("choice", [DENSE, FfnChoice(cluster=1)], ids=["dense", "pack"])
@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_logits_are_those_of_torch(family: str, choice: FfnChoice, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    torch_decoder.use(choice)
    expected, expected_pieces = blocks(torch_decoder), pieces(torch_decoder)
    for threads in (1, 3):
        decoder = NativeDecoder(bundle, threads=threads)
        decoder.use(choice)
        assert near(blocks(decoder), expected)
        assert near(in_steps(decoder), expected[130:])
        assert close(pieces(decoder), expected_pieces, 4e-3)
        assert close(pieces(decoder, 8), expected_pieces, 4e-3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_logits_are_those_of_torch(family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """What differs is the rounding of activations to int8."""
    bundle = open_bundle(tiny_bundle(family, quantize=kind))
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder = NativeDecoder(bundle, threads=2)
    for choice in (DENSE, FfnChoice(cluster=1)):
        torch_decoder.use(choice)
        decoder.use(choice)
        expected = blocks(torch_decoder)
        for got, reference in ((blocks(decoder), expected), (in_steps(decoder), expected[130:])):
            assert near(got, reference)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_calls_are_alike(isa: str, family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """A prompt's tokens are to the bit the same however it is cut, whichever experts the others use."""
    decoder = NativeDecoder(open_bundle(tiny_bundle(family, quantize=kind)), threads=2, isa=isa)
    expected = blocks(decoder)
    for cuts in ((2, 5, 12, 44), (40, 48, 65, 100), (64,)):
        decoder.truncate(0)
        bounds = [0, *cuts, len(IDS)]
        pieces = [decoder.forward(IDS[a:b], all_logits=True) for a, b in itertools.pairwise(bounds)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_rows_are_those_of_tokens_alone(isa: str, family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    """To the bit: neither the others' experts nor a prompt that is read beside them change a token."""
    decoder = NativeDecoder(open_bundle(tiny_bundle(family, quantize=kind)), threads=2, isa=isa)
    decoder.use(FfnChoice(cluster=1))
    starts = (20, 33, 41, 70, 71)
    alone = []
    for start in starts:
        decoder.truncate(0)
        decoder.forward(IDS[:start])
        alone.append([decoder.forward([token_id])[0] for token_id in IDS[start : start + 4]])
    decoder.truncate(0)
    block = decoder.forward(IDS[:50])
    sequences = [decoder.add_sequence() for _ in starts]
    for sequence, start in zip(sequences, starts, strict=True):
        decoder.select(sequence)
        decoder.forward(IDS[:start])
    decoder.select(0)
    decoder.truncate(0)
    for step in range(4):
        ids = [IDS[start + step] for start in starts]
        if step == 2:
            got = decoder.forward_beside(IDS[:50], sequences, ids, last_logits=True)
            np.testing.assert_array_equal(got[:1], block)
            got = got[1:]
        else:
            got = decoder.forward_rows(sequences, ids)
        np.testing.assert_array_equal(got, np.stack([rows[step] for rows in alone]))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_reads_the_chosen_experts_alone(family: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize="int4"))
    decoder, manifest = NativeDecoder(bundle, threads=1), bundle.manifest
    counted = token_bytes(manifest)
    assert manifest.model.expert_neurons == manifest.model.ffn_dim // 6
    assert counted.pack_ffn == counted.dense_ffn
    for choice in (DENSE, FfnChoice(cluster=0)):
        decoder.use(choice)
        assert decoder.bytes_per_token(0, greedy=True) == counted.pack


def test_another_run_and_other_threads_change_no_bit(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("qwen3_moe", quantize="int4"))
    first = in_steps(NativeDecoder(bundle, threads=2))
    np.testing.assert_array_equal(in_steps(NativeDecoder(bundle, threads=2)), first)
    whole = blocks(NativeDecoder(bundle, threads=1))
    np.testing.assert_array_equal(blocks(NativeDecoder(bundle, threads=3)), whole)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_texts_of_all_modes(engine: Literal["native", "torch"], tiny_bundle: Callable[..., Path]) -> None:
    made = runtime.load(tiny_bundle("olmoe"), engine=engine)
    prompt = "The kitchen text number 3 speaks of"
    alone = made.generate(prompt, mode="similarity", max_new_tokens=12)
    together = made.generate([prompt, "court judge clause", prompt], mode="similarity", max_new_tokens=12)
    assert [together[0].text, together[2].text] == [alone.text, alone.text]
    dense = made.generate(prompt, mode="dense", max_new_tokens=12)
    assert made.generate(prompt, mode="lossless", max_new_tokens=12).text == dense.text
    # However long a prompt is, it does not choose neurons of its own unless that is asked for.
    assert made.generate(prompt * 12, mode="auto", max_new_tokens=2).mode in ("similarity", "dense")


def test_experts_that_contribute_least_are_left_out(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = with_expert_options(replace(tiny_inputs("olmoe"), budgets=None), 2, 4, "tiny")
    record = ExpertsRecord(num_experts=4, num_chosen=2, normalizes=False)
    energies = np.array([[1, 9, 1, 9], [5, 6, 7, 8], [1, 1, 1, 1]], dtype=np.float32)
    assert expert_budgets(config, 1.0, energies, record) == [4, 4, 4]
    assert expert_budgets(config, 0.667, energies, record) == [2, 4, 2]
    assert expert_budgets(config, 0.5, energies, record) == [2, 2, 2]
    assert expert_budgets(replace(config, budgets="uniform"), 0.75, energies, record) == [3, 3, 3]
    with pytest.raises(ConfigError, match=r"--keep 0\.4: expected at least 0\.5, as each token uses 2 of 4 experts"):
        expert_budgets(config, 0.4, energies, record)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dense": False}, "--no-dense"),
        ({"keep": None, "budget_mb": 1.0}, "--budget-mb"),
        ({"selection": "griffin"}, "--selection griffin"),
        ({"budgets": "sensitivity"}, "--budgets sensitivity"),
        ({"removal": "second-order"}, "--removal second-order: whole experts are not repaired"),
        (
            {"ridge": 0.1, "heal_steps": 3},
            r"2 problems: \(1\) --ridge: whole.* \(2\) --heal-steps: experts are not",
        ),
        ({"max_memory": 4.0}, "--max-memory"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_that_do_not_apply_are_refused_by_name(
    options: dict[str, Any], named: str, tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    with pytest.raises(
        ConfigError, match=f"olmoe is a mixture of experts, for which some options do not apply: {named}"
    ):
        compile_model(replace(tiny_inputs("olmoe"), **options))


def test_a_quality_is_found_by_leaving_experts_out(tiny_bundle: Callable[..., Path]) -> None:
    """Experts that the router seldom chooses cost little: a random model's are all chosen."""
    manifest = open_bundle(tiny_bundle("olmoe", keep=None, max_kl=0.4, budgets=None, clusters=2)).manifest
    assert manifest.quality is not None
    keeps = [cluster.keep_ratio for cluster in manifest.clusters]
    assert 2 / 6 <= min(keeps) < 1
    assert all(entry.score.kl <= 0.4 for entry in manifest.quality.per_cluster)
    assert {control.name for control in manifest.quality.controls} == {"one static mask", "random assignment"}
    assert manifest.quality.dense.kl < 0.01
    for cluster in manifest.clusters:
        assert all(budget % 32 == 0 for budget in cluster.layer_budgets)
    text = "\n".join(describe(manifest))
    assert "6 experts of 32, 2 a token" in text
    assert " of 6 experts" in text


def test_a_mixture_writes_its_own_text(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    config = replace(
        tiny_inputs("olmoe"), calibration=("builtin",), output=tmp_path / "bundle", calibration_tokens=1500, clusters=1
    )
    manifest = compile_model(config)
    assert manifest.clusters[0].num_tokens > 500


def test_a_pack_with_too_few_experts_is_named(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle("mixtral"), tmp_path / "bundle"))
    with edit_manifest(folder) as data:
        data["clusters"][1]["layer_budgets"][2] = 96

    def cut(tensors: dict[str, StoredTensor]) -> None:
        tensors["layers.2.experts"] = StoredTensor("I32", tensors["layers.2.experts"].array[:1])

    change_tensors(folder, "clusters/001.safetensors", cut)
    with pytest.raises(BundleCorrupt, match=r"layers\.2\.experts: expected 2 or more ascending ids below 6"):
        open_bundle(folder)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_device_with_little_memory_runs_experts(family: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family))
    plain = TorchDecoder(bundle, device="cpu", dtype="float32")
    for limit in (100.0, 0.62):
        placed = TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=limit)
        for choice in (DENSE, FfnChoice(cluster=0), FfnChoice(cluster=1), DENSE):
            for decoder in (plain, placed):
                decoder.use(choice)
            np.testing.assert_allclose(blocks(placed), blocks(plain), atol=1e-5)


def test_what_mixtures_lack_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "quantized", "olmoe")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    change_json(tmp_path / "quantized" / "config.json", quantization_config=method)
    with pytest.raises(UnsupportedModelError, match="of mixtures of experts only plain ones are read"):
        read_config(find_source(str(tmp_path / "quantized")))


def test_what_a_compile_takes_is_planned(
    tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path]
) -> None:
    config = replace(tiny_inputs("qwen3_moe"), quantize="int4")
    machine = Machine(num_threads=1, float32_gflops=1.0, bfloat16_gflops=1.0, read_gbps=1.0)
    plan = make_plan(config, find_inputs(config), lambda: machine)
    manifest = open_bundle(tiny_bundle("qwen3_moe", quantize="int4")).manifest
    counted = token_bytes(manifest)
    assert (plan.token_bytes_pack, plan.token_bytes_dense) == (counted.pack, counted.dense)
    assert plan.keep == pytest.approx(4 / 6)
    assert not {stage.name for stage in plan.stages} & {"sensitivity", "curves", "reconstruct"}
