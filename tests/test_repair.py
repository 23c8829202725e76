from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.compiler.layerwise import LayerActivations
from coreinfer.compiler.repair import RIDGES, RepairTask, gram_matrix, mean_gram, repair_layer, ridge_solutions

HIDDEN = 5


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_tokens: int, ffn_dim: int, *, seed: int, mixing_seed: int = 100) -> torch.Tensor:
    """Activations of few causes, so that kept neurons know much of dropped ones."""
    causes = random_tensor(num_tokens, 6, seed=seed)
    return causes @ random_tensor(6, ffn_dim, seed=mixing_seed) + 0.1 * random_tensor(
        num_tokens, ffn_dim, seed=seed + 1
    )


def as_layer(documents: Sequence[torch.Tensor]) -> LayerActivations:
    starts = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    activations = torch.cat([*documents])
    return LayerActivations(
        layer=0, activations=activations, starts=starts, stream_energies=torch.ones(len(activations))
    )


def ids_of(*neurons: int) -> npt.NDArray[np.int32]:
    return np.array(neurons, dtype=np.int32)


def output_error(activations: torch.Tensor, weights: torch.Tensor, ids: Sequence[int], narrow: torch.Tensor) -> float:
    """Squared error of the narrow FFN's output, in double precision."""
    wanted = activations.double() @ weights.double()
    return float((wanted - activations[:, list(ids)].double() @ narrow.double()).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "ffn_dim"), [(1, 1), (7, 63), (50, 65), (9, 386), (8193, 70)])
def test_gram_matrix_equals_the_product(num_tokens: int, ffn_dim: int, dtype: torch.dtype) -> None:
    activations = random_tensor(num_tokens, ffn_dim).to(dtype)
    gram = gram_matrix(activations)
    exact = activations.double().numpy().T @ activations.double().numpy()
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram.T)
    np.testing.assert_allclose(gram.numpy(), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_mean_gram_takes_the_tokens_of_its_documents_only() -> None:
    documents = [random_tensor(length, 40, seed=length) for length in (3, 8, 5)]
    chosen = torch.cat([documents[0], documents[2]]).double()
    got = mean_gram(as_layer(documents), [0, 2])
    np.testing.assert_allclose(got.double(), chosen.T @ chosen / 8, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1, 3.0])
def test_ridge_solutions_equal_least_squares_of_the_augmented_system(ridge: float) -> None:
    activations, weights = correlated(60, 20, seed=3), random_tensor(20, HIDDEN, seed=4)
    ids = [1, 4, 5, 11, 19]
    gram = gram_matrix(activations) / len(activations)
    solution = ridge_solutions(gram, weights, torch.tensor(ids), [0.5, ridge])[1]
    h, w = activations.double().numpy(), weights.double().numpy()
    lam = ridge * np.diag(h.T @ h / len(h))[ids].mean()
    system = np.vstack([h[:, ids] / np.sqrt(len(h)), np.sqrt(lam) * np.eye(len(ids))])
    right = np.vstack([h @ w / np.sqrt(len(h)), np.sqrt(lam) * w[ids]])
    expected = np.linalg.lstsq(system, right, rcond=None)[0]
    np.testing.assert_allclose(solution.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_all_neurons_or_a_large_ridge_give_the_own_weights() -> None:
    activations, weights = correlated(200, 12, seed=5), random_tensor(12, HIDDEN, seed=6)
    gram = gram_matrix(activations) / len(activations)
    everything = ridge_solutions(gram, weights, torch.arange(12), [1e-3])[0]
    np.testing.assert_allclose(everything, weights, atol=1e-3)
    ids = torch.tensor([0, 3, 7])
    small, large = ridge_solutions(gram, weights, ids, [1e-3, 1e6])
    np.testing.assert_allclose(large, weights[ids], atol=1e-4)
    assert (small - weights[ids]).abs().max() > 0.1


@pytest.mark.parametrize("dead", [[2], [0, 1, 2, 3]])
def test_dead_neurons_keep_their_own_weights(dead: list[int]) -> None:
    activations, weights = correlated(100, 8, seed=7), random_tensor(8, HIDDEN, seed=8)
    activations[:, dead] = 0
    gram = gram_matrix(activations) / len(activations)
    solution = ridge_solutions(gram, weights, torch.tensor([0, 1, 2, 3]), [1e-3])[0]
    np.testing.assert_allclose(solution[dead], weights[dead], atol=1e-5)
    assert torch.isfinite(solution).all()


def test_a_system_that_rounding_made_indefinite_is_solved_in_double_precision() -> None:
    # Three equal neurons of large activations: singular but for the ridge, which float32 rounds away.
    activations = torch.full((40, 3), 1000.0) * torch.linspace(1, 2, 40)[:, None]
    gram = gram_matrix(activations) / len(activations)
    gram[0, 1] = gram[1, 0] = gram[0, 0] * (1 + 1e-7)
    weights = random_tensor(3, HIDDEN, seed=9)
    solution = ridge_solutions(gram, weights, torch.arange(3), [1e-6])[0]
    np.testing.assert_allclose(solution.sum(dim=0), weights.sum(dim=0), atol=1e-2)


def two_cluster_task(cluster_weight: float = 0.3) -> RepairTask:
    """Documents 0 to 3 are calibrated on, 4 and 5 are validation text."""
    return RepairTask(
        neuron_ids=[ids_of(0, 2, 5, 9, 11), ids_of(1, 2, 6, 8, 15)],
        validation=[[4], [5]],
        cluster_weight=cluster_weight,
    )


def repair(
    layer: LayerActivations,
    weights: torch.Tensor,
    task: RepairTask,
    ridges: Sequence[float],
    documents: Sequence[Sequence[int]] = ((0, 1), (2, 3)),
) -> tuple[list[torch.Tensor], float | None]:
    """Repair with the Gram matrices of each cluster's calibration documents."""
    grams = [mean_gram(layer, members) for members in documents]
    overall = mean_gram(layer, [index for members in documents for index in members])
    return repair_layer(layer, weights, task, ridges, iter(grams), overall)


def same_kind_of_text() -> LayerActivations:
    return as_layer([correlated(50, 16, seed=10 * number) for number in range(6)])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_repair_mixes_the_cluster_with_all_text(weight: float) -> None:
    layer, weights, task = same_kind_of_text(), random_tensor(16, HIDDEN, seed=11), two_cluster_task(weight)
    solutions, ridge = repair(layer, weights, task, (1e-2,))
    assert ridge == 1e-2
    for ids, documents, solution in zip(task.neuron_ids, ([0, 1], [2, 3]), solutions, strict=True):
        gram = weight * mean_gram(layer, documents) + (1 - weight) * mean_gram(layer, range(4))
        expected = ridge_solutions(gram, weights, torch.from_numpy(ids).long(), [1e-2])[0]
        np.testing.assert_allclose(solution, expected, atol=1e-4)


def test_without_validation_text_the_first_ridge_is_taken() -> None:
    layer, weights = same_kind_of_text(), random_tensor(16, HIDDEN, seed=12)
    task = RepairTask(neuron_ids=[ids_of(0, 4)], validation=[[]], cluster_weight=0.3)
    solutions, ridge = repair(layer, weights, task, (0.5, 0.1), [[0, 1, 2, 3]])
    assert ridge == 0.5
    expected = ridge_solutions(mean_gram(layer, range(4)), weights, torch.tensor([0, 4]), [0.5])[0]
    np.testing.assert_allclose(solutions[0], expected, atol=1e-5)


def validation_error(
    layer: LayerActivations, weights: torch.Tensor, task: RepairTask, found: Sequence[torch.Tensor]
) -> float:
    return sum(
        output_error(layer.of_documents(documents), weights, ids.tolist(), solution)
        for documents, ids, solution in zip(task.validation, task.neuron_ids, found, strict=True)
    )


def own_rows(weights: torch.Tensor, task: RepairTask) -> list[torch.Tensor]:
    return [weights[torch.from_numpy(ids).long()] for ids in task.neuron_ids]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_tokens", [3, 12, 200])
def test_the_ridge_is_the_best_one_on_validation_text(seed: int, num_tokens: int) -> None:
    documents = [correlated(num_tokens, 16, seed=100 * seed + 10 * number) for number in range(4)]
    validation = [correlated(60, 16, seed=100 * seed + 77 + number) for number in range(2)]
    layer, weights, task = as_layer([*documents, *validation]), random_tensor(16, HIDDEN, seed=seed), two_cluster_task()
    errors: dict[float | None, float] = {
        ridge: validation_error(
            layer, weights, task, repair(layer, weights, replace(task, validation=[[], []]), (ridge,))[0]
        )
        for ridge in RIDGES
    }
    errors[None] = validation_error(layer, weights, task, own_rows(weights, task))
    solutions, ridge = repair(layer, weights, task, RIDGES)
    assert ridge == min(errors, key=lambda key: errors[key])
    assert validation_error(layer, weights, task, solutions) == pytest.approx(errors[ridge])
    assert errors[ridge] <= errors[None]


def test_noise_in_thin_text_asks_for_a_larger_ridge() -> None:
    weights, task = random_tensor(16, HIDDEN, seed=1), two_cluster_task()
    noise = as_layer([random_tensor(length, 16, seed=n) for n, length in enumerate((3, 3, 3, 3, 300, 300))])
    _, ridge = repair(noise, weights, task, (1e-3, 100.0))
    assert ridge != 1e-3
    _, ridge = repair(same_kind_of_text(), weights, task, (100.0, 1e-3))
    assert ridge == 1e-3


def test_a_repair_that_validation_text_contradicts_is_not_shipped() -> None:
    # In calibration text each dropped neuron repeats a kept one, in validation text it does the opposite.
    kept, dropped = [0, 2, 5, 9, 11], [1, 3, 4, 6, 7]
    documents = []
    for number in range(6):
        activations = torch.zeros(80, 16)
        activations[:, kept] = random_tensor(80, 5, seed=number)
        activations[:, dropped] = activations[:, kept] * (1 if number < 4 else -1)
        documents.append(activations)
    layer, weights = as_layer(documents), random_tensor(16, HIDDEN, seed=20)
    task = replace(two_cluster_task(), neuron_ids=[ids_of(*kept)] * 2)
    solutions, ridge = repair(layer, weights, task, RIDGES)
    assert ridge is None
    assert all(torch.equal(solution, weights[kept]) for solution in solutions)
    agreeing = replace(task, validation=[[2], [3]])
    solutions, ridge = repair(layer, weights, agreeing, RIDGES, [[0], [1]])
    assert ridge == min(RIDGES)
    np.testing.assert_allclose(solutions[0], weights[kept] + weights[dropped], atol=0.01)


def test_clusters_without_validation_text_have_no_say() -> None:
    layer, weights = same_kind_of_text(), random_tensor(16, HIDDEN, seed=13)
    task = replace(two_cluster_task(), validation=[[4], []])
    solutions, ridge = repair(layer, weights, task, RIDGES)
    assert ridge in RIDGES
    assert len(solutions) == 2
    assert not torch.equal(solutions[1], own_rows(weights, task)[1])
