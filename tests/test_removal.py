from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.compiler.prune.removal import System, remove_neurons, solve

HIDDEN = 5
Doubles = npt.NDArray[np.float64]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_tokens: int, ffn_dim: int, *, seed: int) -> torch.Tensor:
    """Activations of few causes, so that kept neurons know much of dropped ones."""
    causes = random_tensor(num_tokens, 6, seed=seed) @ random_tensor(6, ffn_dim, seed=seed + 50)
    return causes + 0.3 * random_tensor(num_tokens, ffn_dim, seed=seed + 1)


def system_of(activations: torch.Tensor, weights: torch.Tensor, *, ridge: float = 1e-2, seed: int = 9) -> System:
    """Towards outputs that the model's own weights do not quite give."""
    targets = activations @ weights + 0.2 * random_tensor(len(activations), HIDDEN, seed=seed)
    return System(
        gram=activations.T @ activations / len(activations),
        cross=activations.T @ targets / len(activations),
        own=weights,
        ridge=ridge,
    )


def metric(seed: int = 3) -> torch.Tensor:
    root = random_tensor(HIDDEN, HIDDEN, seed=seed)
    return root @ root.T + 0.1 * torch.eye(HIDDEN)


def least_cost(system: System, costs: torch.Tensor, kept: list[int]) -> float:
    """Least of tr M (X^T H X - 2 X^T B) over X with the kept rows only, in double precision."""
    hessian: Doubles = (system.gram + system.lam * torch.eye(len(system.gram))).double().numpy()
    right: Doubles = (system.cross + system.lam * system.own).double().numpy()
    best = np.linalg.solve(hessian[np.ix_(kept, kept)], right[kept])
    return -float(np.trace(costs.double().numpy() @ best.T @ right[kept]))


def test_each_removal_is_the_one_that_costs_least_after_the_repair() -> None:
    system, costs = system_of(correlated(80, 10, seed=1), random_tensor(10, HIDDEN, seed=2)), metric()
    kept, losses = list(range(10)), [0.0]
    start = least_cost(system, costs, kept)
    while len(kept) > 4:
        rests = [[i for i in kept if i != gone] for gone in kept]
        kept = min(rests, key=lambda rest: least_cost(system, costs, rest))
        losses.append(least_cost(system, costs, kept) - start)
        found = remove_neurons(system, costs, keep=len(kept), step=1)
        assert found.neuron_ids.tolist() == kept
        np.testing.assert_allclose(found.losses, losses, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("step", [2, 3, 7])
def test_losses_of_several_at_a_time_are_exact(step: int) -> None:
    system, costs = system_of(correlated(80, 12, seed=4), random_tensor(12, HIDDEN, seed=5)), metric()
    start = least_cost(system, costs, list(range(12)))
    found = remove_neurons(system, costs, keep=5, step=step)
    assert len(found.neuron_ids) == 5
    assert len(found.losses) == -(-7 // step) + 1
    expected = least_cost(system, costs, found.neuron_ids.tolist()) - start
    assert found.losses[-1] == pytest.approx(expected, rel=1e-2)


def test_it_beats_most_other_choices() -> None:
    system, costs = system_of(correlated(80, 9, seed=6), random_tensor(9, HIDDEN, seed=7)), metric()
    found = least_cost(system, costs, remove_neurons(system, costs, keep=4, step=1).neuron_ids.tolist())
    others = sorted(least_cost(system, costs, [*kept]) for kept in combinations(range(9), 4))
    assert found <= others[len(others) // 20]


def test_the_metric_decides() -> None:
    """Neurons 0 and 1 fire alike; each writes one output."""
    activations = torch.eye(2).repeat(20, 1)
    weights = torch.zeros(2, HIDDEN)
    weights[0, 0] = weights[1, 1] = 1
    system = System(gram=activations.T @ activations / 40, cross=0.5 * weights, own=weights, ridge=1e-3)
    for dear in (0, 1):
        costs = torch.eye(HIDDEN)
        costs[dear, dear] = 4
        assert remove_neurons(system, costs, keep=1).neuron_ids.tolist() == [dear]


def test_a_copy_costs_nothing() -> None:
    activations = random_tensor(60, 6, seed=8)
    activations[:, 5] = activations[:, 2]
    weights = random_tensor(6, HIDDEN, seed=9)
    gram = activations.T @ activations / 60
    found = remove_neurons(System(gram=gram, cross=gram @ weights, own=weights, ridge=1e-4), metric(), keep=5, step=1)
    assert len({2, 5} & set(found.neuron_ids.tolist())) == 1
    assert found.losses[-1] < 1e-2


def test_dead_neurons_go_first_and_nothing_breaks() -> None:
    activations = correlated(60, 8, seed=10)
    activations[:, [1, 6]] = 0
    system = system_of(activations, random_tensor(8, HIDDEN, seed=11))
    found = remove_neurons(system, metric(), keep=6, step=1)
    assert found.neuron_ids.tolist() == [0, 2, 3, 4, 5, 7]
    silent = System(gram=torch.zeros(4, 4), cross=torch.zeros(4, HIDDEN), own=torch.ones(4, HIDDEN), ridge=1e-2)
    assert len(remove_neurons(silent, metric(), keep=2).neuron_ids) == 2


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1, 3.0])
def test_solutions_equal_least_squares_of_the_augmented_system(ridge: float) -> None:
    activations, weights = correlated(60, 20, seed=3), random_tensor(20, HIDDEN, seed=4)
    targets = random_tensor(60, HIDDEN, seed=12)
    ids = [1, 4, 5, 11, 19]
    cross = activations.T @ targets / 60
    system = System(gram=activations.T @ activations / 60, cross=cross, own=weights, ridge=1.0)
    solution = solve(system, torch.tensor(ids), [0.5, ridge])[1]
    h, w = activations.double().numpy(), weights.double().numpy()
    lam = ridge * np.diag(h.T @ h / len(h))[ids].mean()
    left = np.vstack([h[:, ids] / np.sqrt(len(h)), np.sqrt(lam) * np.eye(len(ids))])
    right = np.vstack([targets.double().numpy() / np.sqrt(len(h)), np.sqrt(lam) * w[ids]])
    np.testing.assert_allclose(solution, np.linalg.lstsq(left, right, rcond=None)[0], rtol=1e-3, atol=1e-3)


def test_a_large_ridge_gives_the_own_weights() -> None:
    activations, weights = correlated(200, 12, seed=5), random_tensor(12, HIDDEN, seed=6)
    ids = torch.tensor([0, 3, 7])
    small, large = solve(system_of(activations, weights), ids, [1e-3, 1e6])
    np.testing.assert_allclose(large, weights[ids], atol=1e-4)
    assert (small - weights[ids]).abs().max() > 0.1


def test_dead_neurons_keep_their_own_weights() -> None:
    activations, weights = correlated(100, 8, seed=7), random_tensor(8, HIDDEN, seed=8)
    activations[:, 2] = 0
    solution = solve(system_of(activations, weights), torch.arange(4), [1e-3])[0]
    np.testing.assert_allclose(solution[2], weights[2], atol=1e-5)


def test_systems_that_rounding_made_indefinite_are_solved_in_double_precision() -> None:
    # Three equal neurons of large activations: singular but for the ridge, which float32 rounds away.
    activations = torch.full((40, 3), 1000.0) * torch.linspace(1, 2, 40)[:, None]
    gram = activations.T @ activations / len(activations)
    gram[0, 1] = gram[1, 0] = gram[0, 0] * (1 + 1e-7)
    weights = random_tensor(3, HIDDEN, seed=9)
    system = System(gram=gram, cross=gram @ weights, own=weights, ridge=1e-6)
    solution = solve(system, torch.arange(3), [1e-6])[0]
    np.testing.assert_allclose(solution.sum(dim=0), weights.sum(dim=0), atol=1e-2)
