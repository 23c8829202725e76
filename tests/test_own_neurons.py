"""Neurons that a prompt chooses for itself of a mixture of experts (modes stability and fused), in both engines."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.bundles.contract import expert_role, kept_experts, tensor_name
from coreinfer.bundles.families import family_of_config, resolve
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.engines.torch.mixture import ExpertRun, take_experts
from coreinfer.runtime.load_options import EngineName
from coreinfer.runtime.routing.modes import ModePlan, decode_choice
from coreinfer.runtime.routing.own_neurons import equal_budgets

from .bundle_factory import written_once
from .model_factory import MIXTURES, build_model, save_model
from .test_mixtures import IDS, blocks, close, in_steps, near, pieces, reference_logits
from .test_narrow_experts import NEURONS, cut_into, pack_ids, wide_settings, zeroed_logits
from .test_planning import NEAR, chosen_for_decoding, ids_of, naive_scores, naive_top

PROMPT = IDS[:3]
"""So short that some experts are not used: three tokens use six at most, two of each layer's six by each token."""


@pytest.fixture(scope="module")
def mixture(
    tiny_bundle: Callable[..., Path],
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Bundle]:
    """A function (family, packs, quantize) that returns a bundle whose packs have whole or narrow experts."""
    folder = tmp_path_factory.mktemp("narrow")

    def write(family: str, output: Path, options: dict[str, Any]) -> None:
        model = save_model(tmp_path_factory.mktemp(family), family, **wide_settings(family))
        compile_model(replace(tiny_inputs(family), model=str(model), output=output, **options))

    narrow = written_once(folder, write)

    def opened(family: str, packs: str = "narrow", quantize: str = "bf16") -> Bundle:
        if packs == "whole":
            return open_bundle(tiny_bundle(family, quantize=quantize))
        options = {"experts": "narrow", "clusters": 2, "budgets": "energy", "keep": 0.6, "quantize": quantize}
        return open_bundle(narrow(family, **options))

    return opened


def statistic_of(decoder: Decoder, bundle: Bundle, ids: Sequence[int]) -> np.ndarray:
    decoder.truncate(0)
    decoder.use(DENSE)
    selection = bundle.manifest.plan.selection
    return decoder.prompt_statistics(ids, (selection,))[1][selection]


def own(decoder: Decoder, bundle: Bundle, mode: runtime.Mode = "stability") -> FfnChoice:
    """What a prompt of 40 tokens chooses."""
    ids = IDS[60:100]
    return decode_choice(ModePlan(mode=mode), NEAR, bundle, statistic_of(decoder, bundle, ids), len(ids))


def expert_runs(family: str, ids: Sequence[int], **settings: Any) -> list[list[ExpertRun]]:
    """What the experts of each layer of transformers' model do with a text, and each layer's mixture's norms."""
    model = build_model(family, **settings)
    row = family_of_config(model.config.to_dict(), family)
    assert row.experts is not None
    take_experts(model, row)
    runs: list[list[ExpertRun]] = []
    for layer in resolve(model, row.layers):
        runs.append([])
        layer.get_submodule(row.experts.module).watch = runs[-1].append
    with torch.inference_mode():
        model(torch.tensor([list(ids)]))
    return runs


def naive_of_experts(bundle: Bundle, family: str, ids: Sequence[int], **settings: Any) -> list[list[list[float]]]:
    """Scores of each neuron of each expert of each layer, by the definitions in docs/method.md."""
    assert bundle.dense is not None
    scores = []
    for layer, runs in enumerate(expert_runs(family, ids, **settings)):
        downs = [bundle.dense[tensor_name(layer, expert_role(number, "down"))].array for number in range(6)]
        norms = [np.linalg.norm(as_float(down), axis=0) for down in downs]
        # Of an expert that no token used the norms alone; they come after all others.
        found = [[1e-12 * float(norm) for norm in own] for own in norms]
        for run in runs:
            outputs = np.zeros((len(ids), run.activations.shape[1]))
            outputs[run.rows.numpy()] = (run.activations * run.weights[:, None]).numpy()
            found[run.expert] = naive_scores("output-aware", outputs, norms[run.expert].tolist())
        scores.append(found)
    return scores


def as_float(bits: np.ndarray) -> np.ndarray:
    values: np.ndarray = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values


def at_one(scores: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = scores / np.sqrt(np.mean(scores**2))
    return scaled


@pytest.mark.parametrize("mode", ["stability", "fused"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_each_expert_keeps_its_own_best_neurons(
    family: str, mode: runtime.Mode, mixture: Callable[..., Bundle]
) -> None:
    bundle, size = mixture(family), NEURONS[family]
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    statistic = statistic_of(decoder, bundle, PROMPT)
    used = statistic.reshape(3, 6, size).any(axis=2)
    assert 2 <= used.sum(axis=1).min() < 6
    scores = np.array(naive_of_experts(bundle, family, PROMPT, **wide_settings(family)))
    expected = []
    for layer, of_layer in enumerate(scores):
        mixed, width = at_one(of_layer), bundle.manifest.plan.layer_budgets[layer] // 6
        if mode == "fused":
            cluster = bundle.pack(NEAR.cluster)[tensor_name(layer, "scores")].array.reshape(6, size)
            # Three tokens beside the hundred that count as much as the cluster.
            mixed = 3 / 103 * mixed + 100 / 103 * cluster
        expected.append([e * size + i for e, own in enumerate(mixed) for i in naive_top(own.tolist(), width)])
    choice = decode_choice(ModePlan(mode=mode), NEAR, bundle, statistic, len(PROMPT))
    assert ids_of(choice) == expected


@pytest.mark.parametrize("mode", ["stability", "fused"])
def test_a_prompt_chooses_whole_experts_where_packs_have_them(
    mode: runtime.Mode, mixture: Callable[..., Bundle]
) -> None:
    bundle = mixture("granitemoe", "whole")
    size = bundle.manifest.model.expert_neurons
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    statistic = statistic_of(decoder, bundle, PROMPT)
    expected = []
    for layer, of_layer in enumerate(naive_of_experts(bundle, "granitemoe", PROMPT)):
        scores = at_one(np.sqrt(np.square(np.array(of_layer)).sum(axis=1)))
        if mode == "fused":
            scores = 3 / 103 * scores + 100 / 103 * bundle.pack(NEAR.cluster)[tensor_name(layer, "scores")].array
        expected.append([size * e + i for e in naive_top(scores.tolist(), 4) for i in range(size)])
    choice = decode_choice(ModePlan(mode=mode), NEAR, bundle, statistic, len(PROMPT))
    assert ids_of(choice) == expected


def test_both_engines_sum_the_same(mixture: Callable[..., Bundle]) -> None:
    """Tokens that rounding sends to other experts aside: most of twelve texts have none."""
    for family in ("qwen3_moe", "gpt_oss"):
        bundle = mixture(family)
        decoders = TorchDecoder(bundle, device="cpu", dtype="float32"), NativeDecoder(bundle, threads=2)
        errors = []
        for start in range(0, 144, 12):
            expected, got = (statistic_of(decoder, bundle, IDS[start : start + 12]) for decoder in decoders)
            errors.append(np.abs(got - expected).max() / np.abs(expected).max())
        assert np.quantile(errors, 0.6) < 2e-2
        # In parts, of which the last has one token, as all at once.
        whole = statistic_of(decoders[1], bundle, IDS[:13])
        decoders[1].truncate(0)
        parts = [decoders[1].prompt_statistics(ids, ("output-aware",))[1] for ids in (IDS[:12], IDS[12:13])]
        assert np.abs(sum(part["output-aware"] for part in parts) - whole).max() < 2e-2 * whole.max()


@pytest.mark.parametrize("family", MIXTURES)
def test_torch_computes_a_model_without_the_others(family: str, mixture: Callable[..., Bundle]) -> None:
    for packs in ("narrow", "whole"):
        bundle = mixture(family, packs)
        decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
        choice = own(decoder, bundle)
        assert choice.neuron_ids is not None
        if packs == "narrow":
            expected = zeroed_logits(family, choice.neuron_ids)
        else:
            size = bundle.manifest.model.expert_neurons
            expected = reference_logits(family, keep=[np.unique(ids // size).tolist() for ids in choice.neuron_ids])
        decoder.use(choice)
        np.testing.assert_allclose(blocks(decoder), expected, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(in_steps(decoder), expected[130:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("packs", ["narrow", "whole"])
@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_logits_are_those_of_torch(family: str, packs: str, mixture: Callable[..., Bundle]) -> None:
    bundle = mixture(family, packs)
    torch_decoder, decoder = TorchDecoder(bundle, device="cpu", dtype="float32"), NativeDecoder(bundle, threads=3)
    choice = own(torch_decoder, bundle, "fused")
    # From other widths, and back.
    for each in (choice, DENSE, FfnChoice(cluster=1), choice):
        decoder.use(each)
        torch_decoder.use(each)
        expected = pieces(torch_decoder)
        assert close(pieces(decoder), expected, 4e-3)
        assert close(pieces(decoder, 8), expected, 4e-3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("packs", ["narrow", "whole"])
@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_packed_logits_are_those_of_torch(family: str, packs: str, kind: str, mixture: Callable[..., Bundle]) -> None:
    """What differs is the rounding of activations to int8, and of narrow down projections."""
    bundle = mixture(family, packs, kind)
    torch_decoder, decoder = TorchDecoder(bundle, device="cpu", dtype="float32"), NativeDecoder(bundle, threads=2)
    choice = own(torch_decoder, bundle)
    for each in (torch_decoder, decoder):
        each.use(choice)
    # Short texts: in a long one most tokens come after one that rounding sent to another expert.
    assert near(pieces(decoder), pieces(torch_decoder))
    assert close(pieces(decoder, 8), pieces(decoder), 1e-3)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_calls_are_alike(isa: str, mixture: Callable[..., Bundle]) -> None:
    """To the bit, with any number of threads, however a text is cut."""
    bundle = mixture("granitemoe", "narrow", "int4")
    decoder, other = (NativeDecoder(bundle, threads=threads, isa=isa) for threads in (2, 3))
    choice = own(decoder, bundle)
    for each in (decoder, other):
        each.use(choice)
    expected = blocks(decoder)
    np.testing.assert_array_equal(blocks(other), expected)
    np.testing.assert_array_equal(cut_into(decoder, 2, 5, 12, 44), expected)


@pytest.mark.parametrize(("packs", "kind"), [("narrow", "bf16"), ("whole", "int4")])
def test_a_pack_of_the_same_neurons_is_the_same(packs: str, kind: str, mixture: Callable[..., Bundle]) -> None:
    """Also to the bit, where nothing is rounded again: a gathered FFN lies as a pack does."""
    bundle = mixture("olmoe", packs, kind)
    if packs == "narrow":
        ids = tuple(pack_ids(bundle, 1))
    else:
        kept = kept_experts(bundle.pack(1), bundle.manifest)
        ids = tuple(np.flatnonzero(np.isin(np.arange(6), own).repeat(32)).astype(np.int32) for own in kept)
    for decoder in (NativeDecoder(bundle, threads=2), TorchDecoder(bundle, device="cpu", dtype="float32")):
        found = []
        for choice in (FfnChoice(cluster=1), FfnChoice(neuron_ids=ids)):
            decoder.use(choice)
            found.append(blocks(decoder))
        np.testing.assert_array_equal(*found)


def test_a_token_reads_a_pack(mixture: Callable[..., Bundle]) -> None:
    """Experts of which all is kept are read where they lie; of narrow ones in int4 the down projection becomes int8."""
    for packs, kind in (("narrow", "bf16"), ("whole", "int4")):
        bundle = mixture("gpt_oss", packs, kind)
        decoder = NativeDecoder(bundle, threads=1)
        sizes = []
        for choice in (FfnChoice(cluster=0), own(decoder, bundle)):
            decoder.use(choice)
            sizes.append(decoder.bytes_per_token(0))
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("packs", ["narrow", "whole"])
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_texts_are_those_of_the_prompts_own_neurons(
    engine: EngineName, packs: str, mixture: Callable[..., Bundle]
) -> None:
    bundle = mixture("qwen3_moe", packs)
    made = runtime.load(bundle.path, engine=engine, dtype="float32" if engine == "torch" else "auto")
    prompts = ["The kitchen text number 3 speaks of", "court judge clause"]
    for mode in ("stability", "fused"):
        choice, tokens = chosen_for_decoding(made, prompts[0], mode)
        ids = made.tokenizer.encode(prompts[0]).ids
        statistic = statistic_of(made.decoder, bundle, ids)
        route = made.router.route(prompts[0])
        assert ids_of(choice) == ids_of(decode_choice(ModePlan(mode=mode), route, bundle, statistic, len(ids)))
        made.decoder.truncate(0)
        made.decoder.use(DENSE)
        logits = made.decoder.forward(ids)
        made.decoder.use(choice)
        for token_id in tokens:
            assert int(logits[-1].argmax()) == token_id
            logits = made.decoder.forward([token_id])
        alone = [made.generate(prompt, raw=True, mode=mode, max_new_tokens=12).text for prompt in prompts]
        together = made.generate(prompts, raw=True, mode=mode, max_new_tokens=12)
        assert [generation.text for generation in together] == alone


def test_norms_are_those_of_columns(mixture: Callable[..., Bundle], tiny_bundle: Callable[..., Path]) -> None:
    """Stored with token shares, computed otherwise."""
    options = {"packs": "thin", "token_share": 0.6, "keep": None, "budgets": None, "quantize": "int4"}
    stored = open_bundle(tiny_bundle("olmoe", **options))
    np.testing.assert_allclose(stored.down_norms, mixture("olmoe", "whole", "int4").down_norms, rtol=1e-2)
    assert stored.dense is not None
    np.testing.assert_array_equal(stored.down_norms[2, 32:64], stored.dense["layers.2.experts.1.down_norms"].array)


def test_wrong_neurons_of_experts_are_refused(mixture: Callable[..., Bundle]) -> None:
    bundle = mixture("olmoe", "whole")
    few, unlike = np.arange(32), np.r_[0:16, 32:64]
    for ids, native in ((few, "experts of a layer: expected at least 2, got 1"), (unlike, "16, as of the one before")):
        choice = FfnChoice(neuron_ids=(ids.astype(np.int32),) * 3)
        with pytest.raises(ValueError, match=native):
            NativeDecoder(bundle, threads=1).use(choice)
        with pytest.raises(ConfigError, match="neuron_ids: expected as many of each expert of 2 or more"):
            TorchDecoder(bundle, device="cpu", dtype="float32").use(choice)
    for ids in ([0, 3, 2], [5, 5], [192], [-1]):
        with pytest.raises(ValueError, match="neuron id"):
            NativeDecoder(bundle, threads=1).use(FfnChoice(neuron_ids=(np.array(ids, dtype=np.int32),) * 3))


def test_equal_budgets_are_whole_units(mixture: Callable[..., Bundle]) -> None:
    for packs, family, unit in (("narrow", "qwen3_moe", 6), ("whole", "olmoe", 32)):
        manifest = mixture(family, packs).manifest
        plan = replace(manifest.plan, layer_budgets=(unit * 4, unit * 5, unit * 5))
        assert equal_budgets(replace(manifest, plan=plan)) == (unit * 4,) * 3


@pytest.mark.parametrize("weights", ["bfloat16", "packed"])
def test_a_device_holds_a_prompts_own_neurons(weights: str, mixture: Callable[..., Bundle]) -> None:
    """Gathered ones are plain, also where others are packed."""
    for family, packs in (("gpt_oss", "narrow"), ("granitemoe", "narrow"), ("gpt_oss", "whole")):
        bundle = mixture(family, packs, "int4")
        plain = TorchDecoder(bundle, device="cpu", dtype="float32")
        placed = TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=100, weights=weights)
        expected, got = (statistic_of(decoder, bundle, PROMPT) for decoder in (plain, placed))
        np.testing.assert_allclose(got, expected, atol=1e-4 * expected.max())
        choice = own(plain, bundle)
        for each in (FfnChoice(cluster=0), choice, DENSE, choice):
            for decoder in (plain, placed):
                decoder.use(each)
            np.testing.assert_allclose(blocks(placed), blocks(plain), atol=1e-5 if weights == "bfloat16" else 1e-3)
