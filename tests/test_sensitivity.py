from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.gradients import draw_tokens
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.sensitivity import fisher_matrices, removal_curves
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document

from .model_factory import FAMILIES, VOCABULARY, build_model, build_tokenizer

NO_CACHE = Cache(None)


def load(name: str) -> LoadedModel:
    model = build_model(name)
    family = family_of_config(model.config.to_dict(), name)
    return wrap_model(model, build_tokenizer(), family=family, name=name, config=model.config)


def documents_of(count: int, length: int) -> list[Document]:
    generator = np.random.default_rng(3)
    ids = generator.integers(3, VOCABULARY, (count, length))
    return [Document(text="", routing_text="", token_ids=tuple(row.tolist())) for row in ids]


def logits_with_noise(loaded: LoadedModel, layer: int, scale: float, document: Document, seed: int) -> torch.Tensor:
    """Log-probabilities with white noise added to a layer's FFN output behind the first token."""

    def disturb(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        noise = scale * torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        noise.view(-1, output.shape[-1])[0] = 0
        return output + noise

    handle = loaded.projection(layer, "down").register_forward_hook(disturb)
    try:
        with torch.inference_mode():
            logits: torch.Tensor = loaded.model(torch.tensor([document.token_ids])).logits[0]
    finally:
        handle.remove()
    return logits.double().log_softmax(dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_the_fisher_form_predicts_the_divergence_of_small_errors(name: str) -> None:
    loaded, documents = load(name), documents_of(40, 48)
    fisher = fisher_matrices(Alone(loaded), documents, NO_CACHE, "key", Progress(), seed=0)
    for layer in range(3):
        # Undo the damping, which adds a twentieth of the mean diagonal.
        trace = float(fisher[layer].trace()) / 1.05
        scale = 0.03 / np.sqrt(trace)
        total = 0.0
        for number, document in enumerate(documents):
            exact = logits_with_noise(loaded, layer, 0.0, document, number)
            disturbed = logits_with_noise(loaded, layer, scale, document, number)
            total += float((exact.exp() * (exact - disturbed)).sum()) / 47
        assert total / len(documents) == pytest.approx(0.5 * scale**2 * trace, rel=0.25)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    log_p = shares.log().expand(20_000, -1)
    drawn = draw_tokens(log_p, torch.rand((len(log_p), 1), generator=torch.Generator().manual_seed(1)))
    assert drawn.shape == (20_000, 1)
    found = torch.bincount(drawn[:, 0], minlength=6) / 20_000
    torch.testing.assert_close(found, shares, atol=0.015, rtol=0)
    assert found[[0, 2, 5]].tolist() == [0, 0, 0]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    loaded, documents = load("llama"), documents_of(6, 20)
    next(loaded.model.parameters()).requires_grad_(False)
    needed = [parameter.requires_grad for parameter in loaded.model.parameters()]
    first = fisher_matrices(Alone(loaded), documents, Cache(tmp_path), "key", Progress(), seed=0)
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == needed
    assert not any(loaded.projection(layer, "down")._forward_hooks for layer in range(3))
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    progress = Progress()
    again = fisher_matrices(Alone(loaded), documents, Cache(tmp_path), "key", progress, seed=0)
    assert torch.equal(first, again)
    assert not progress.stage_seconds
    assert torch.equal(first, fisher_matrices(Alone(loaded), documents, NO_CACHE, "key", Progress(), seed=0))
    assert not torch.equal(first, fisher_matrices(Alone(loaded), documents, NO_CACHE, "key", Progress(), seed=1))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_curves_rise_from_nothing_and_scale_with_what_errors_cost(name: str) -> None:
    loaded, documents = load(name), documents_of(12, 40)
    fisher = fisher_matrices(Alone(loaded), documents, NO_CACHE, "key", Progress(), seed=0)

    def curves(metrics: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return removal_curves(Alone(loaded), documents, metrics, NO_CACHE, "key", Progress()).costs

    found = curves(fisher)
    assert found.shape == (3, 3)
    assert (found[:, 0] == 0).all()
    assert (np.diff(found, axis=1) > 0).all()
    np.testing.assert_allclose(curves(4 * fisher), 4 * found, rtol=1e-3)


def test_a_shorter_gradient_path_is_not_taken_for_none(tiny_bundle: Callable[..., Path]) -> None:
    """A compile with sensitivity budgets makes up the keep ratio."""
    from coreinfer.bundles import open_bundle

    plan = open_bundle(tiny_bundle("gemma3", budgets="sensitivity", keep=0.6)).manifest.plan
    assert plan.budgets == "sensitivity"
    assert sum(plan.layer_budgets) == round(0.6 * 9) * 32
