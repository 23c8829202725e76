from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles.families import family_by_name
from coreinfer.compiler import Progress
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.prune.profile import Profile, profile_model, spread_over_clusters
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document

from .model_factory import VOCABULARY, build_model, build_tokenizer
from .test_config import make_config

LENGTHS = (9, 30, 17, 22, 9)
ASSIGNMENTS = {"clusters": np.array([0, 1, 0, 2, 1]), "one static mask": np.zeros(5, dtype=np.int64)}


@dataclass(frozen=True)
class Seen:
    """What hooks see of one document: (layers, tokens, ffn_dim) and (layers, tokens)."""

    activations: npt.NDArray[np.float64]
    energies: npt.NDArray[np.float64]


@pytest.fixture(scope="module", params=["llama", "opt"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    model = build_model(request.param)
    family = family_by_name(request.param)
    return wrap_model(model, build_tokenizer(), family=family, name="tiny", config=model.config)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    generator = np.random.default_rng(1)
    ids = [tuple(generator.integers(3, VOCABULARY, length).tolist()) for length in LENGTHS]
    return [Document(text="", routing_text="", token_ids=token_ids) for token_ids in ids]


@pytest.fixture(scope="module")
def seen(loaded: LoadedModel, documents: list[Document]) -> list[Seen]:
    return [_run(loaded, document) for document in documents]


def _run(loaded: LoadedModel, document: Document) -> Seen:
    activations: list[Any] = []
    energies: list[Any] = []
    handles = []
    for index, layer in enumerate(loaded.layers):
        handles += [
            loaded.projection(index, "down").register_forward_pre_hook(
                lambda _, inputs: activations.append(inputs[0].reshape(-1, 96).double().numpy())
            ),
            layer.register_forward_hook(
                lambda _, inputs, output: energies.append(
                    (output[0] if isinstance(output, tuple) else output)
                    .reshape(-1, 32)
                    .double()
                    .square()
                    .sum(-1)
                    .numpy()
                )
            ),
        ]
    with torch.inference_mode():
        loaded.model(torch.tensor([document.token_ids]))
    for handle in handles:
        handle.remove()
    return Seen(np.stack(activations), np.stack(energies))


def profile(loaded: LoadedModel, documents: list[Document], selection: str, folder: Path | None = None) -> Profile:
    config = make_config(selection=selection, alpha=0.35, beta=0.25)
    return profile_model(config, Alone(loaded), documents, ASSIGNMENTS, Cache(folder), "key", Progress())


def naive_core_counts(activations: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sentence-wise core neurons of one layer, as the paper says it; ties do not occur in random models."""
    counts = np.zeros(96)
    for token in activations:
        positive = [neuron for neuron in range(96) if token[neuron] > 0]
        ranked = sorted(positive, key=lambda neuron: -token[neuron])
        for neuron in ranked[: int(np.ceil(0.35 * len(positive)))]:
            counts[neuron] += 1
    marks = np.zeros(96)
    marks[sorted(range(96), key=lambda neuron: (-counts[neuron], neuron))[: round(0.25 * 96)]] = 1
    return marks


def naive_statistic(selection: str, activations: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if selection == "coreinfer":
        return naive_core_counts(activations)
    total = np.zeros(96)
    for token in activations:
        total += token**2 / (float((token**2).sum()) if selection == "griffin" else 1)
    return total


@pytest.mark.parametrize("selection", ["output-aware", "griffin", "coreinfer"])
def test_sums_equal_a_naive_loop(
    selection: str, loaded: LoadedModel, documents: list[Document], seen: list[Seen]
) -> None:
    found = profile(loaded, documents, selection)
    for name, labels in ASSIGNMENTS.items():
        expected = np.zeros((labels.max() + 1, 3, 96))
        for label, document in zip(labels, seen, strict=True):
            for layer in range(3):
                expected[label, layer] += naive_statistic(selection, document.activations[layer])
        np.testing.assert_allclose(found.statistics[name], expected, rtol=1e-3, atol=1e-3)
        tokens = [sum(np.array(LENGTHS)[labels == cluster]) for cluster in range(labels.max() + 1)]
        assert found.num_tokens[name].tolist() == tokens


def test_relative_energies_are_divided_token_by_token(
    loaded: LoadedModel, documents: list[Document], seen: list[Seen]
) -> None:
    found = profile(loaded, documents, "output-aware").relative_energies
    shares = [document.activations**2 / document.energies[:, :, None] for document in seen]
    np.testing.assert_allclose(found, np.concatenate(shares, axis=1).mean(axis=1), rtol=1e-3, atol=1e-7)


def test_a_cached_profile_is_the_same_and_runs_nothing(
    loaded: LoadedModel, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = profile(loaded, documents, "output-aware", tmp_path)

    def no_walk(*args: object) -> Iterator[object]:
        pytest.fail("a cached profile must not run the model")

    monkeypatch.setattr("coreinfer.compiler.prune.profile.layer_of", no_walk)
    second = profile(loaded, documents, "output-aware", tmp_path)
    np.testing.assert_array_equal(first.relative_energies, second.relative_energies)
    for name in ASSIGNMENTS:
        np.testing.assert_array_equal(first.statistics[name], second.statistics[name])
        np.testing.assert_array_equal(first.num_tokens[name], second.num_tokens[name])


def corpus_of(labels: npt.NDArray[np.int64]) -> list[Document]:
    return [Document(text="", routing_text="", token_ids=(3,) * 100) for _ in labels]


def test_a_sample_is_spread_over_the_clusters() -> None:
    labels = np.array([0] * 400 + [1] * 100 + [2] * 20 + [3] * 3)
    picked = spread_over_clusters(corpus_of(labels), labels, 5230, least=4)
    assert np.all(np.diff(picked) > 0)
    # Every tenth of each cluster; of small ones at least four, of the smallest all.
    assert np.bincount(labels[picked]).tolist() == [40, 10, 4, 3]


def test_a_small_corpus_is_profiled_whole() -> None:
    labels = np.array([0, 1, 1])
    assert spread_over_clusters(corpus_of(labels), labels, 300, least=1).tolist() == [0, 1, 2]


def test_a_cluster_without_sampled_documents_has_scores_of_nothing(
    loaded: LoadedModel, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreinfer.compiler.prune.profile.PROFILE_TOKENS", 1)
    monkeypatch.setattr("coreinfer.compiler.prune.profile._LEAST_DOCUMENTS", 1)
    found = profile(loaded, documents, "output-aware")
    for name, labels in ASSIGNMENTS.items():
        assert len(found.statistics[name]) == len(found.num_tokens[name]) == labels.max() + 1
    # The clusters choose the sample; a control's document may be left out.
    assert all(found.num_tokens[next(iter(ASSIGNMENTS))])
