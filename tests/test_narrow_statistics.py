"""What narrow experts are chosen by: sums of each expert's neurons over the tokens that were routed to it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.mixtures.experts import profile_experts
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.prune.select import choose_neurons, layer_budgets
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.mixture import ExpertRun

from .model_factory import VOCABULARY, build_model
from .test_config import make_config
from .test_narrow_experts import wide_settings


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
    expected, weights = np.zeros((2, 6)), np.zeros((2, 6))
    for document, label in zip(documents, (1, 0, 1), strict=True):
        loaded.mixture(1).watch = partial(_count, expected[label], weights[label])
        with torch.inference_mode():
            loaded.model(torch.tensor([document.token_ids]))
    loaded.mixture(1).watch = None
    np.testing.assert_array_equal(profile.expert_tokens["clusters"][:, 1], expected)
    np.testing.assert_allclose(profile.expert_weights["clusters"][:, 1], weights, rtol=1e-5)
    assert expected.sum() == 70 * 2


def _count(counts: np.ndarray, weights: np.ndarray, run: ExpertRun) -> None:
    counts[run.expert] += len(run.rows)
    weights[run.expert] += float(run.weights.sum())


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
