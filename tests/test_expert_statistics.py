"""What a compile sums over the tokens of each expert, and the experts that a comparison puts back."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import family_of_config, ffn_tensors
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.mixtures.experts import profile_experts
from coreinfer.compiler.quantize.moments import ffn_moments, input_moments
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.mixture import ExpertRun

from .model_factory import VOCABULARY, build_model
from .test_carrying import load
from .test_config import make_config


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = build_model("qwen3_moe")
    family = family_of_config(model.config.to_dict(), "tiny")
    return wrap_model(model, None, family=family, name="tiny", config=model.config)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Of unlike lengths, so that batches have padding."""
    random = np.random.default_rng(0)
    ids = [tuple(random.integers(3, VOCABULARY, length).tolist()) for length in (40, 7, 23)]
    return [Document(text="", routing_text="", token_ids=token_ids) for token_ids in ids]


def watch_layer(loaded: LoadedModel, documents: Sequence[Document], look: Callable[[ExpertRun], None]) -> None:
    """Run documents one by one through the model, and look at what the experts of the second layer do."""
    mixture = loaded.mixture(1)
    try:
        with torch.inference_mode():
            for document in documents:
                mixture.watch = look
                loaded.model(torch.tensor([document.token_ids]))
    finally:
        mixture.watch = None


def test_moments_are_of_the_tokens_that_chose_an_expert(loaded: LoadedModel, documents: list[Document]) -> None:
    """Padding has none, and an expert with few tokens has none either."""
    moments = input_moments(Alone(loaded), documents, Cache(None), "key", Progress())
    counts, sums = np.zeros(6), {number: torch.zeros(40) for number in range(6)}

    def look(run: ExpertRun) -> None:
        counts[run.expert] += len(run.rows)
        sums[run.expert] += run.activations.square().sum(dim=0)

    watch_layer(loaded, documents, look)
    assert 0 < (counts < 32).sum() < 6
    for number, count in enumerate(counts):
        found = ffn_moments(moments, loaded.family, 1, expert_role(number, "down"), None)
        if count < 32:
            assert found is None
        else:
            assert found is not None
            np.testing.assert_allclose(found.numpy(), sums[number].numpy() / 70, rtol=1e-4)


def test_a_profile_sums_what_experts_add_to_the_stream(loaded: LoadedModel, documents: list[Document]) -> None:
    labels = np.array([1, 0, 1])
    profile = profile_experts(
        make_config(), Alone(loaded), documents, {"clusters": labels}, Cache(None), "key", Progress()
    )
    energies: list[torch.Tensor] = []
    expected = np.zeros((2, 6))

    def look(run: ExpertRun) -> None:
        energies[-1][run.rows, run.expert] = run.outputs.square().sum(dim=-1)

    def end(_module: object, _inputs: object, output: torch.Tensor) -> None:
        share = energies[-1] / output.reshape(-1, 32).square().sum(dim=-1, keepdim=True)
        expected[labels[len(energies) - 1]] += share.sum(dim=0).numpy()

    handle = loaded.layers[1].register_forward_hook(end)
    for document in documents:
        energies.append(torch.zeros(len(document.token_ids), 6))
        watch_layer(loaded, [document], look)
    handle.remove()
    np.testing.assert_allclose(profile.statistics["clusters"][:, 1], expected, rtol=1e-4)
    np.testing.assert_allclose(profile.relative_energies[1], expected.sum(axis=0) / 70, rtol=1e-4)
    np.testing.assert_array_equal(profile.num_tokens["clusters"], [7, 63])


def test_a_mixture_gets_its_own_experts_back() -> None:
    loaded, ids = load("mixtral"), torch.tensor([list(range(3, 40))])
    own = {role: 2 * tensor for role, tensor in ffn_tensors(loaded.layers[0], loaded.family).items()}
    with torch.inference_mode():
        before = loaded.model(ids).logits
        for _ in range(2):
            with ffn_in_use(loaded, lambda _layer, _cluster: own, 0):
                assert not torch.equal(loaded.model(ids).logits, before)
            assert torch.equal(loaded.model(ids).logits, before)
