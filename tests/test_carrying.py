from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles.families import assign_ffn, cache_argument, family_of_config, ffn_tensors
from coreinfer.bundles.formats import float_matrix
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.layerwise import run_partly
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.dealt import Find, LayerTokens
from coreinfer.compiler.prune.layer_repair import NarrowInputs
from coreinfer.compiler.prune.narrow import Assignment, NarrowModel, narrow_layer
from coreinfer.compiler.prune.reconstruct import narrow_all
from coreinfer.compiler.prune.repair import CLUSTER_WEIGHTS, RepairTask, repair_layer
from coreinfer.compiler.prune.select import Choice
from coreinfer.compiler.prune.sums import Sums
from coreinfer.compiler.quantize.moments import input_moments
from coreinfer.compiler.quantize.pack import Packer
from coreinfer.compiler.quantize.quantize import QuantizeOptions
from coreinfer.compiler.quantize.rounding import Rounding
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.team.team import Team, Worker
from coreinfer.compiler.text.corpus import Document, split_point
from transformers import DynamicCache

from .model_factory import FAMILIES, VOCABULARY, build_model, build_tokenizer
from .test_config import make_config

LENGTHS = (20, 41, 33, 20, 57, 26, 38, 40)
NUM_VALIDATION = 2
BUDGETS = [64, 96, 32]
CLUSTERS = np.array([0, 1, 1, 0, 1, 0])


def load(name: str) -> LoadedModel:
    model = build_model(name)
    family = family_of_config(model.config.to_dict(), name)
    return wrap_model(model, build_tokenizer(), family=family, name=name, config=model.config)


def documents() -> list[Document]:
    generator = np.random.default_rng(1)
    rows = [generator.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]
    return [Document(text="", routing_text="", token_ids=tuple(row)) for row in rows]


def inputs_of(loaded: LoadedModel, **options: Any) -> NarrowInputs:
    texts = documents()
    scores = np.random.default_rng(2).random((2, 3, 96)).astype(np.float32)
    ids = [
        [np.sort(np.argsort(-layer)[:budget]).astype(np.int32) for layer, budget in zip(rows, BUDGETS, strict=True)]
        for rows in scores
    ]
    main = Assignment(
        name="clusters", calibration=CLUSTERS, validation=np.array([0, 1]), held_out=np.zeros(0, np.int64)
    )
    one = Assignment(
        name="one static mask",
        calibration=CLUSTERS * 0,
        validation=np.zeros(2, np.int64),
        held_out=np.zeros(0, np.int64),
    )
    return NarrowInputs(
        config=make_config(**options),
        team=Alone(loaded),
        calibration=texts[:-NUM_VALIDATION],
        validation=texts[-NUM_VALIDATION:],
        assignments=[main, one],
        choices={
            main.name: Choice(scores=scores, neuron_ids=ids),
            one.name: Choice(scores=scores[:1], neuron_ids=ids[:1]),
        },
        budgets={main.name: [BUDGETS] * 2, one.name: [BUDGETS]},
        metrics=torch.eye(32).expand(3, -1, -1),
    )


def run(inputs: NarrowInputs, folder: Path | None = None) -> dict[str, NarrowModel]:
    return narrow_all(inputs, Cache(folder), "key", Progress())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[LayerTokens]:
    """What each repair reads from now on, layer after layer and stream after stream."""
    read: list[LayerTokens] = []

    def look(worker: Worker, find: Find) -> None:
        # Layers and streams share one buffer.
        tokens = find(worker).tokens
        read.append(LayerTokens(activations=tokens.activations.clone(), targets=tokens.targets.clone()))

    def spy(team: Team, finds: Mapping[int, Find], *given: Any) -> Any:
        team.call(0, "spy", look, finds[0]).result()
        return (yield from repair_layer(team, finds, *given))

    monkeypatch.setattr("coreinfer.compiler.prune.layer_repair.repair_layer", spy)
    return read


def activations_behind(loaded: LoadedModel, narrow: NarrowModel, cluster: int, layer: int, document: Document) -> Any:
    """What a layer's FFN really sees: the first half read dense, the second narrow in the layers before it."""
    seen = []
    handle = loaded.projection(layer, "down").register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, 96)))
    start, ids = split_point(len(document.token_ids)), torch.tensor([document.token_ids])
    dense = [ffn_tensors(module, loaded.family) for module in loaded.layers]
    cache = DynamicCache()
    try:
        with torch.inference_mode():
            loaded.model(ids[:, :start], **cache_argument(loaded.model, cache), use_cache=True)
            narrowed = [narrow_layer(loaded, narrow, index, cluster) for index in range(layer)]
            for module, tensors in zip(loaded.layers, narrowed, strict=False):
                assign_ffn(module, loaded.family, tensors)
            loaded.model(ids[:, start:], **cache_argument(loaded.model, cache), use_cache=True)
    finally:
        handle.remove()
        for module, tensors in zip(loaded.layers, dense, strict=True):
            assign_ffn(module, loaded.family, tensors)
    return torch.cat(seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_fitted_on_what_the_narrow_model_really_sees(name: str, seen: list[LayerTokens]) -> None:
    loaded = load(name)
    narrow = run(inputs_of(loaded))
    # Layers 0 and 2 are narrowed, for the clusters and for the control; layer 1 keeps all its neurons.
    labels = {"clusters": [*CLUSTERS, 0, 1], "one static mask": [0] * 8}
    for tokens, item in zip(seen[2:], labels, strict=True):
        first = 0
        for document, cluster in zip(documents(), labels[item], strict=True):
            rows = tokens.activations[first : first + len(document.token_ids)]
            expected = activations_behind(loaded, narrow[item], int(cluster), 2, document)
            np.testing.assert_allclose(rows, expected, atol=2e-4)
            first += len(document.token_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_candidates_are_looked_at(name: str, seen: list[LayerTokens]) -> None:
    loaded, candidates = load(name), np.arange(7, 87, dtype=np.int32)
    inputs = replace(inputs_of(loaded, removal="second-order"), candidates=(candidates, None, candidates))
    narrow = run(inputs)["clusters"]
    assert all(set(layers[layer]) <= {*candidates} for layers in narrow.choice.neuron_ids for layer in (0, 2))
    assert {len(layers[0]) for layers in narrow.choice.neuron_ids} == {64}
    # Where narrow models were narrowed, the text is read with what was found, and activations are those of candidates.
    first = 0
    for document, cluster in zip(documents(), [*CLUSTERS, 0, 1], strict=True):
        rows = seen[2].activations[first : first + len(document.token_ids)]
        expected = activations_behind(loaded, narrow, int(cluster), 2, document)[:, candidates]
        np.testing.assert_allclose(rows, expected, atol=2e-4)
        first += len(document.token_ids)


def test_all_neurons_as_candidates_are_none(seen: list[LayerTokens]) -> None:
    loaded, everything = load("llama"), np.arange(96, dtype=np.int32)
    inputs = inputs_of(loaded, removal="second-order")
    expected, found = run(inputs), run(replace(inputs, candidates=(everything,) * 3))
    for name in expected:
        for layer in range(3):
            for cluster, ids in enumerate(expected[name].choice.neuron_ids):
                assert found[name].choice.neuron_ids[cluster][layer].tolist() == ids[layer].tolist()
                np.testing.assert_array_equal(found[name].downs[layer][cluster], expected[name].downs[layer][cluster])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_narrow_goes_through_rounded_weights(name: str, seen: list[LayerTokens]) -> None:
    loaded = load(name)
    rounding = Rounding(
        kind="int4",
        down_kinds=("int4",) * 3,
        moments=input_moments(Alone(loaded), documents(), Cache(None), "key", Progress()),
    )
    run(replace(inputs_of(loaded), rounding=rounding))
    dense = [first_activations(loaded, document) for document in documents()]
    with rounding.layer(loaded, 0):
        rounded = [first_activations(loaded, document) for document in documents()]
    first = 0
    for before, after in zip(dense, rounded, strict=True):
        start = split_point(len(before))
        expected = torch.cat([before[:start], after[start:]])
        np.testing.assert_allclose(seen[0].activations[first : first + len(before)], expected, atol=2e-4)
        assert (before - after)[start:].abs().max() > 1e-3
        first += len(before)
    # Back in their places.
    for before, document in zip(dense, documents(), strict=True):
        assert torch.equal(first_activations(loaded, document), before)


def first_activations(loaded: LoadedModel, document: Document) -> torch.Tensor:
    """What the first layer's down projection reads: (tokens, ffn_dim)."""
    seen = []
    handle = loaded.projection(0, "down").register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, 96)))
    with torch.inference_mode():
        loaded.model(torch.tensor([document.token_ids]))
    handle.remove()
    return torch.cat(seen)


def test_down_projections_are_rounded_as_they_will_be_stored() -> None:
    loaded = load("llama")
    moments = input_moments(Alone(loaded), documents(), Cache(None), "key", Progress())
    down, ids = torch.randn(40, 32) * 0.1, np.arange(3, 43, dtype=np.int32)
    packer = Packer(formats=QuantizeOptions(body="int4", head="int8"), moments=moments)
    stored = packer.matrix("w", down.T, moments["model.layers.1.mlp.down_proj"][3:43])
    rounded = Rounding(kind="int4", down_kinds=("int4",) * 3, moments=moments).down(loaded, 1, down, ids)
    np.testing.assert_array_equal(rounded, float_matrix(stored, "w", (32, 40)).T)


def test_without_carrying_layers_see_the_dense_model(seen: list[LayerTokens]) -> None:
    loaded = load("llama")
    run(inputs_of(loaded, carry=False))
    every = NarrowModel(
        choice=Choice(scores=np.ones((1, 3, 96), np.float32), neuron_ids=[[np.arange(96, dtype=np.int32)] * 3]),
        downs=[[None]] * 3,
        biases=[[None]] * 3,
        ridges=(None,) * 3,
    )
    expected = torch.cat([activations_behind(loaded, every, 0, 2, document) for document in documents()])
    np.testing.assert_allclose(seen[2].activations, expected, atol=1e-4)
    assert torch.equal(seen[2].activations, seen[3].activations)


def output_errors(loaded: LoadedModel, narrow: NarrowModel, item: Sequence[int]) -> float:
    """Squared error of the narrow model's last hidden states on the second halves."""
    total = 0.0
    for document, cluster in zip(documents(), item, strict=True):
        whole = activations_behind(loaded, narrow, int(cluster), 2, document)[split_point(len(document.token_ids)) :]
        layer, dense = narrow_layer(loaded, narrow, 2, int(cluster)), ffn_tensors(loaded.layers[2], loaded.family)
        ids = torch.from_numpy(narrow.choice.neuron_ids[int(cluster)][2]).long()
        total += float((whole @ dense["down"].T - whole[:, ids] @ layer["down"].T).square().sum())
    return total


def test_repaired_second_order_removal_beats_the_scores_alone() -> None:
    loaded = load("llama")
    labels = [*CLUSTERS, 0, 1]
    second = run(inputs_of(loaded))["clusters"]
    plain = run(inputs_of(loaded, reconstruct=False))["clusters"]
    assert [len(ids) for ids in second.choice.neuron_ids[0]] == BUDGETS
    assert plain.choice.neuron_ids[0][0].tolist() == inputs_of(loaded).choices["clusters"].neuron_ids[0][0].tolist()
    assert output_errors(loaded, second, labels) < 0.8 * output_errors(loaded, plain, labels)


def test_controls_take_the_cluster_weight_that_the_clusters_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, chosen = [], []

    def spy(team: Team, finds: Mapping[int, Find], task: RepairTask, known: Any) -> Any:
        repaired = yield from repair_layer(team, finds, task, known)
        tried.append(tuple(task.cluster_weights))
        chosen.append(repaired.cluster_weight)
        # Say the second, so that a control that takes the first is seen.
        return replace(repaired, cluster_weight=CLUSTER_WEIGHTS[1])

    monkeypatch.setattr("coreinfer.compiler.prune.layer_repair.repair_layer", spy)
    run(inputs_of(load("llama"), cluster_weight="auto"))
    # Layer 1 keeps all neurons.
    assert tried == [CLUSTER_WEIGHTS, CLUSTER_WEIGHTS[1:]] * 2
    assert set(chosen[::2]) <= set(CLUSTER_WEIGHTS)
    assert set(chosen[1::2]) == {CLUSTER_WEIGHTS[1]}


def test_top_k_keeps_the_neurons_of_the_scores() -> None:
    inputs = inputs_of(load("llama"), removal="top-k")
    narrow = run(inputs)["clusters"]
    for found, wanted in zip(narrow.choice.neuron_ids, inputs.choices["clusters"].neuron_ids, strict=True):
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]
    assert narrow.downs[0][0] is not None
    assert narrow.downs[1][0] is None


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_nothing_is_run_twice_before_the_first_layer_that_is_narrowed(
    name: str, tmp_path: Path, seen: list[LayerTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers_run = []

    def spy(loaded: LoadedModel, index: int, *arguments: Any) -> Any:
        layers_run.append(index)
        return run_partly(loaded, index, *arguments)

    monkeypatch.setattr("coreinfer.compiler.prune.streams.run_partly", spy)
    loaded, budgets = load(name), [96, 96, 64]
    inputs = inputs_of(loaded)
    everything = [np.arange(96, dtype=np.int32)] * 3
    inputs = replace(
        inputs,
        budgets={"clusters": [budgets] * 2, "one static mask": [budgets]},
        choices={
            item: replace(choice, neuron_ids=[everything] * len(choice.scores))
            for item, choice in inputs.choices.items()
        },
    )
    narrow = run(inputs, tmp_path)
    assert set(layers_run) == {2}
    for tokens in seen:
        expected = [activations_behind(loaded, narrow["clusters"], 0, 2, document) for document in documents()]
        np.testing.assert_allclose(tokens.activations, torch.cat(expected), atol=2e-4)
    assert [len(ids) for ids in narrow["clusters"].choice.neuron_ids[0]] == budgets
    layers_run.clear()
    run(inputs, tmp_path)
    assert not layers_run


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_interrupted_pass_goes_on_and_ends_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(name)
    whole = run(inputs_of(loaded), tmp_path / "whole")
    real, calls = repair_layer, list[int]()

    def fail_at_third(*given: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return (yield from real(*given))

    monkeypatch.setattr("coreinfer.compiler.prune.layer_repair.repair_layer", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(inputs_of(loaded), tmp_path / "half")
    resumed = run(inputs_of(loaded), tmp_path / "half")
    # Two assignments in layer 2 only: layer 0 is not solved again.
    assert len(calls) == 5
    for item, model in whole.items():
        for layer in range(3):
            for cluster in range(len(model.choice.neuron_ids)):
                first, second = model.downs[layer][cluster], resumed[item].downs[layer][cluster]
                assert (first is None) == (second is None)
                if first is not None and second is not None:
                    np.testing.assert_array_equal(first, second)
    assert replace(whole["clusters"]).ridges == resumed["clusters"].ridges


@pytest.mark.parametrize("options", [{}, {"removal": "top-k"}, {"ridge": 1e-2, "cluster_weight": 0.3}])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_sums_that_are_kept_narrow_as_the_text_does(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    inputs = inputs_of(load(name), carry=False, **options)
    at_once = run(inputs)
    progress = Progress()
    kept = replace(inputs, sums=Sums(cache=Cache(tmp_path), key="ground"))
    assert_same(narrow_all(kept, Cache(None), "key", progress), at_once)
    assert "sums" in progress.stage_seconds
    # Fewer neurons, by the same sums.
    fewer = [32, 64, 32]
    ids = {
        name: [[np.arange(budget, dtype=np.int32) for budget in fewer]] * len(budgets)
        for name, budgets in inputs.budgets.items()
    }
    budgets = {name: [fewer] * len(budgets) for name, budgets in inputs.budgets.items()}
    choices = {name: replace(choice, neuron_ids=ids[name]) for name, choice in inputs.choices.items()}
    again = Progress()
    assert_same(
        narrow_all(replace(kept, budgets=budgets, choices=choices), Cache(None), "key", again),
        run(replace(inputs, budgets=budgets, choices=choices)),
    )
    assert "sums" not in again.stage_seconds


def test_sums_that_have_no_room_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreinfer.compiler.prune.sums.SUMS_BYTES", 1000)
    progress = Progress()
    inputs = replace(inputs_of(load("llama"), carry=False), sums=Sums(cache=Cache(tmp_path), key="ground"))
    assert_same(narrow_all(inputs, Cache(None), "key", progress), run(replace(inputs, sums=None)))
    assert "sums" not in progress.stage_seconds
    assert not list(tmp_path.iterdir())


def assert_same(found: dict[str, NarrowModel], expected: dict[str, NarrowModel]) -> None:
    assert found.keys() == expected.keys()
    for name, narrow in found.items():
        other = expected[name]
        assert narrow.ridges == other.ridges
        for own, theirs in zip(narrow.choice.neuron_ids, other.choice.neuron_ids, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(own, theirs, strict=True))
        for own_layer, their_layer in zip(narrow.downs, other.downs, strict=True):
            for a, b in zip(own_layer, their_layer, strict=True):
                assert (a is None) == (b is None)
                assert a is None or b is None or np.array_equal(a, b)
