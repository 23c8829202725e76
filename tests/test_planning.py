"""Which neurons decode a prompt, against a computation from transformers' own activations written out in loops."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.families import family_by_name, resolve
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import FileRecord
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.routing.modes import ModePlan, decode_choice, plan_mode, serving_cluster
from coreinfer.runtime.routing.router import UNSURE_MARGIN, Route

from .bundle_factory import make_manifest
from .model_factory import build_model, corpus_texts

NEAR = Route(cluster=1, distance=0.01, margin=0.2, familiar=True)
FAR = replace(NEAR, distance=1.5, familiar=False)
TORN = replace(NEAR, margin=0.9 * UNSURE_MARGIN)
LARGEST = 2
SELECTIONS = ["output-aware", "coreinfer", "griffin"]
ALPHA = 0.25


@pytest.fixture
def load_tiny(tiny_bundle: Callable[..., Path]) -> Callable[..., runtime.Engine]:
    def load(family: str, **options: Any) -> runtime.Engine:
        return runtime.load(tiny_bundle(family, **options), device="cpu", dtype="float32")

    return load


def prompt_activations(family: str, prompt_ids: Sequence[int]) -> list[np.ndarray]:
    """Input of every down projection while transformers reads a prompt: (tokens, neurons) a layer."""
    model = build_model(family)
    row = family_by_name(family)
    seen: list[np.ndarray] = []
    for layer in resolve(model, row.layers):
        hook = resolve(layer, row.down).register_forward_pre_hook
        hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]).numpy().copy()))
    with torch.inference_mode():
        model(torch.tensor([list(prompt_ids)]))
    return seen


def down_norms(family: str) -> list[list[float]]:
    model, row = build_model(family), family_by_name(family)
    downs = [resolve(layer, row.down).weight.detach().double() for layer in resolve(model, row.layers)]
    return [[float(down[:, neuron].norm()) for neuron in range(down.shape[1])] for down in downs]


def naive_scores(selection: str, activations: np.ndarray, norms: Sequence[float]) -> list[float]:
    """Score every neuron of a layer, by the definitions in docs/method.md."""
    tokens, neurons = activations.shape
    h = activations.astype(np.float64)
    if selection == "output-aware":
        means = [sum(h[t, i] ** 2 for t in range(tokens)) / tokens for i in range(neurons)]
        return [math.sqrt(mean) * norm for mean, norm in zip(means, norms, strict=True)]
    if selection == "griffin":
        sizes = [math.sqrt(sum(value**2 for value in row)) for row in h]
        return [math.sqrt(sum((h[t, i] / sizes[t]) ** 2 for t in range(tokens))) for i in range(neurons)]
    counts = [0.0] * neurons
    for row in h:
        positive = sorted((i for i in range(neurons) if row[i] > 0), key=lambda i: (-row[i], i))
        for i in positive[: math.ceil(ALPHA * len(positive))]:
            counts[i] += 1
    return counts


def naive_top(scores: Sequence[float], budget: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget])


def ids_of(choice: FfnChoice) -> list[list[int]]:
    assert choice.neuron_ids is not None
    return [ids.tolist() for ids in choice.neuron_ids]


def chosen_for_decoding(engine: runtime.Engine, prompt: str, mode: runtime.Mode) -> tuple[FfnChoice, list[int]]:
    """The weights that the engine puts in place behind the prompt, and the tokens that it decodes with them."""
    choices: list[FfnChoice] = []
    use = engine.decoder.use

    def record(choice: FfnChoice) -> None:
        choices.append(choice)
        use(choice)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.decoder, "use", record)
        tokens = engine.generate(prompt, raw=True, mode=mode, max_new_tokens=8).token_ids
    assert choices[0] is DENSE
    assert len(choices) == 2
    return choices[1], list(tokens)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_stability_keeps_the_prompts_own_best_neurons(
    family: str, selection: str, load_tiny: Callable[..., runtime.Engine]
) -> None:
    engine = load_tiny(family, selection=selection, alpha=ALPHA)
    prompt = corpus_texts()[5]
    prompt_ids = engine.tokenizer.encode(prompt).ids
    budgets = engine.manifest.plan.layer_budgets
    activations = prompt_activations(family, prompt_ids)
    expected = [
        naive_top(naive_scores(selection, layer, norms), budget)
        for layer, norms, budget in zip(activations, down_norms(family), budgets, strict=True)
    ]
    choice, tokens = chosen_for_decoding(engine, prompt, "stability")
    assert ids_of(choice) == expected

    decoder = engine.decoder
    decoder.truncate(0)
    decoder.use(DENSE)
    logits = decoder.forward(prompt_ids)
    decoder.use(FfnChoice(neuron_ids=tuple(np.array(ids, dtype=np.int32) for ids in expected)))
    for token_id in tokens:
        assert int(logits[-1].argmax()) == token_id
        logits = decoder.forward([token_id])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections_choose_differently(selection: str, load_tiny: Callable[..., runtime.Engine]) -> None:
    """Without this, one way of selection that served for all three would pass."""
    layers = prompt_activations("llama", load_tiny("llama").tokenizer.encode(corpus_texts()[5]).ids)
    norms = down_norms("llama")
    chosen = {
        name: [naive_top(naive_scores(name, h, norm), 64) for h, norm in zip(layers, norms, strict=True)]
        for name in SELECTIONS
    }
    assert all(chosen[selection] != chosen[other] for other in SELECTIONS if other != selection)


def worth(statistic: np.ndarray, kept: list[list[int]]) -> list[float]:
    return [float(layer[ids].sum()) for layer, ids in zip(statistic, kept, strict=True)]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_fused_goes_from_the_cluster_to_the_prompt(selection: str, load_tiny: Callable[..., runtime.Engine]) -> None:
    # Packs whose neurons were chosen by the scores alone.
    engine = load_tiny("llama", selection=selection, alpha=ALPHA, removal="top-k")
    prompt_ids = engine.tokenizer.encode(corpus_texts()[5]).ids
    engine.decoder.truncate(0)
    engine.decoder.use(DENSE)
    selection = engine.manifest.plan.selection
    statistic = engine.decoder.prompt_statistics(prompt_ids, (selection,))[1][selection]
    own = decode_choice(ModePlan(mode="stability"), NEAR, engine.bundle, statistic, len(prompt_ids))

    def fused(num_tokens: int) -> list[list[int]]:
        return ids_of(decode_choice(ModePlan(mode="fused"), NEAR, engine.bundle, statistic, num_tokens))

    pack = engine.bundle.packs[NEAR.cluster]
    cluster = [pack[tensor_name(layer, "neuron_ids")].array.tolist() for layer in range(3)]
    assert fused(0) == cluster
    if selection == "coreinfer":
        # Counts tie often; what little the cluster still says then decides.
        assert [worth(statistic, ids) for ids in (fused(10**9), ids_of(own))] == [worth(statistic, ids_of(own))] * 2
    else:
        assert fused(10**9) == ids_of(own)
    assert cluster != ids_of(own)
    shared = [
        [len(set(a) & set(b)) for a, b in zip(fused(num_tokens), cluster, strict=True)]
        for num_tokens in (0, 30, 100, 1000, 10**9)
    ]
    totals = [sum(layers) for layers in shared]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_fused_weighs_both_alike_at_half_tokens(load_tiny: Callable[..., runtime.Engine]) -> None:
    engine = load_tiny("llama")
    half = engine.manifest.plan.fused_half_tokens
    prompt_ids = engine.tokenizer.encode(" ".join(corpus_texts())).ids[:half]
    engine.decoder.truncate(0)
    engine.decoder.use(DENSE)
    selection = engine.manifest.plan.selection
    statistic = engine.decoder.prompt_statistics(prompt_ids, (selection,))[1][selection]
    expected = []
    pack = engine.bundle.packs[NEAR.cluster]
    for layer, (h, norms) in enumerate(zip(prompt_activations("llama", prompt_ids), down_norms("llama"), strict=True)):
        own = np.array(naive_scores("output-aware", h, norms))
        cluster = pack[tensor_name(layer, "scores")].array.astype(np.float64)
        # Scores of both kinds must be comparable for the weights to mean what they say.
        assert np.sqrt(np.mean(cluster**2)) == pytest.approx(1, rel=1e-3)
        mixed = own / np.sqrt(np.mean(own**2)) + cluster
        expected.append(naive_top(mixed.tolist(), engine.manifest.plan.layer_budgets[layer]))
    choice = decode_choice(ModePlan(mode="fused"), NEAR, engine.bundle, statistic, half)
    assert ids_of(choice) == expected


@pytest.mark.parametrize("mode", ["stability", "fused"])
def test_layer_budgets_are_kept(mode: runtime.Mode, load_tiny: Callable[..., runtime.Engine]) -> None:
    engine = load_tiny("llama", budgets="energy", keep=0.45)
    budgets = list(engine.manifest.plan.layer_budgets)
    assert len(set(budgets)) > 1
    choice, _ = chosen_for_decoding(engine, corpus_texts()[5], mode)
    assert [len(ids) for ids in ids_of(choice)] == budgets
    for pack in engine.bundle.packs:
        assert [pack[tensor_name(layer, "neuron_ids")].array.size for layer in range(3)] == budgets


def test_a_prompt_chooses_for_itself(load_tiny: Callable[..., runtime.Engine]) -> None:
    engine = load_tiny("llama")
    choices = [ids_of(chosen_for_decoding(engine, text, "stability")[0]) for text in corpus_texts()[:3]]
    assert choices[0] != choices[1] != choices[2]


def test_modes_without_a_prompts_neurons(load_tiny: Callable[..., runtime.Engine]) -> None:
    engine = load_tiny("llama")
    assert decode_choice(ModePlan(mode="dense"), NEAR, engine.bundle, None, 9) == DENSE
    assert decode_choice(ModePlan(mode="similarity"), NEAR, engine.bundle, None, 9) == FfnChoice(cluster=1)
    instead = ModePlan(mode="similarity", fallback="unsure", cluster=3)
    assert decode_choice(instead, NEAR, engine.bundle, None, 9) == FfnChoice(cluster=3)


@pytest.mark.parametrize(
    ("dense", "reconstruct", "route", "num_tokens", "expected"),
    [
        (True, True, NEAR, 10, ModePlan(mode="similarity")),
        (True, True, NEAR, 5000, ModePlan(mode="similarity")),
        (True, True, FAR, 10, ModePlan(mode="dense", fallback="unfamiliar")),
        (True, True, TORN, 10, ModePlan(mode="dense", fallback="unsure")),
        (True, True, replace(TORN, familiar=False), 10, ModePlan(mode="dense", fallback="unfamiliar")),
        (True, True, replace(NEAR, margin=UNSURE_MARGIN), 10, ModePlan(mode="similarity")),
        (True, False, NEAR, 199, ModePlan(mode="similarity")),
        (True, False, NEAR, 200, ModePlan(mode="stability")),
        (True, False, FAR, 5000, ModePlan(mode="dense", fallback="unfamiliar")),
        (True, False, TORN, 5000, ModePlan(mode="dense", fallback="unsure")),
        (False, True, FAR, 10, ModePlan(mode="similarity", fallback="unfamiliar", cluster=LARGEST)),
        (False, True, TORN, 10, ModePlan(mode="similarity", fallback="unsure", cluster=LARGEST)),
        (False, False, NEAR, 5000, ModePlan(mode="similarity")),
    ],
)
def test_auto(dense: bool, reconstruct: bool, route: Route, num_tokens: int, expected: ModePlan) -> None:
    manifest = make_manifest(dense=dense, num_clusters=4)
    clusters = list(manifest.clusters)
    clusters[LARGEST] = replace(clusters[LARGEST], num_tokens=5000)
    manifest = replace(manifest, clusters=tuple(clusters))
    files = {LAYOUT.dense: FileRecord(sha256="", bytes=0)} if dense else {}
    manifest = replace(manifest, plan=replace(manifest.plan, reconstruct=reconstruct), files=files)
    plan = plan_mode("auto", manifest, route, num_tokens)
    assert plan == expected
    assert plan.needs_statistic == (expected.mode == "stability")
    assert serving_cluster(plan, route) == (route.cluster if expected.cluster is None else LARGEST)


@pytest.mark.parametrize("mode", ["similarity", "stability", "fused", "dense"])
@pytest.mark.parametrize("route", [NEAR, FAR, TORN])
def test_a_named_mode_is_taken_at_its_word(
    mode: runtime.Mode, route: Route, load_tiny: Callable[..., runtime.Engine]
) -> None:
    plan = plan_mode(mode, load_tiny("llama").manifest, route, 10)
    assert plan == ModePlan(mode=mode)
    assert plan.needs_statistic == (mode in {"stability", "fused"})
