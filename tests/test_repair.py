from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.compiler.prune.dealt import LayerTokens, Seen
from coreinfer.compiler.prune.own_down import OwnDown
from coreinfer.compiler.prune.products import gram_matrix
from coreinfer.compiler.prune.removal import System, remove_neurons, solve
from coreinfer.compiler.prune.repair import RIDGES, Repaired
from coreinfer.compiler.prune.repair import RepairTask as LayerTask
from coreinfer.compiler.prune.repair import repair_layer as repair_by_team
from coreinfer.compiler.prune.rows import Rows
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.team.dealing import finish

from .test_carrying import load

HIDDEN, FFN_DIM, LENGTH = 5, 16, 50


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_tokens: int, *, seed: int) -> torch.Tensor:
    """Activations of few causes, so that kept neurons know much of dropped ones."""
    causes = random_tensor(num_tokens, 6, seed=seed) @ random_tensor(6, FFN_DIM, seed=100)
    return causes + 0.1 * random_tensor(num_tokens, FFN_DIM, seed=seed + 1)


def ids_of(*neurons: int) -> npt.NDArray[np.int32]:
    return np.array(neurons, dtype=np.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "ffn_dim"), [(1, 1), (7, 63), (50, 65), (9, 386), (8193, 70)])
def test_gram_matrix_equals_the_product(num_tokens: int, ffn_dim: int, dtype: torch.dtype) -> None:
    activations = random_tensor(num_tokens, ffn_dim).to(dtype)
    gram = gram_matrix(activations)
    exact = activations.double().numpy().T @ activations.double().numpy()
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram.T)
    np.testing.assert_allclose(gram.numpy(), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


WEIGHTS = random_tensor(FFN_DIM, HIDDEN, seed=11)
IDS = (ids_of(0, 2, 5, 9, 11), ids_of(1, 2, 6, 8, 15))


def rows_of(*documents: int) -> torch.Tensor:
    return torch.cat([torch.arange(number * LENGTH, (number + 1) * LENGTH) for number in documents])


def tokens_of(activations: torch.Tensor, targets: torch.Tensor | None = None) -> LayerTokens:
    return LayerTokens(activations=activations, targets=activations @ WEIGHTS if targets is None else targets)


def same_kind_of_text() -> LayerTokens:
    """Six documents."""
    return tokens_of(torch.cat([correlated(LENGTH, seed=10 * number) for number in range(6)]))


@dataclass(frozen=True, kw_only=True)
class RepairTask:
    """A task, and the rows of each cluster's tokens in place of their number."""

    calibration: Sequence[torch.Tensor]
    validation: Sequence[torch.Tensor]
    weights: torch.Tensor
    bias: torch.Tensor | None
    metric: torch.Tensor
    keeps: Sequence[int]
    neuron_ids: Sequence[npt.NDArray[np.int32]] | None
    cluster_weights: Sequence[float]
    ridges: Sequence[float | None]
    moment_bytes: int = 4 << 30


def repair_layer(tokens: LayerTokens, task: RepairTask, num_places: int = 1) -> Repaired:
    """Repair a layer whose tokens are dealt to some places one by one: every n-th row of a cluster."""
    team = Alone(load("llama"), num_places)
    parts: dict[str, list[list[torch.Tensor]]] = {
        name: [[rows[place::num_places] for rows in getattr(task, name)] for place in range(num_places)]
        for name in ("calibration", "validation")
    }
    seen = [
        Seen(tokens=tokens, rows=Rows(calibration=calibration, validation=validation))
        for calibration, validation in zip(parts["calibration"], parts["validation"], strict=True)
    ]
    counts = {
        name: [
            {place: len(rows[cluster]) for place, rows in enumerate(places) if len(rows[cluster])}
            for cluster in range(len(task.keeps))
        ]
        for name, places in parts.items()
    }
    down = OwnDown(weights=task.weights, bias=task.bias)
    given = {item.name: getattr(task, item.name) for item in fields(task) if item.name not in ("weights", "bias")}
    of_layer = {"own": lambda _: down, "shape": tuple(task.weights.shape), "has_bias": task.bias is not None}
    finds = {place: (lambda _, own=own: own) for place, own in enumerate(seen)}
    return finish(repair_by_team(team, finds, LayerTask(**{**given, **of_layer, **counts}, dtype=torch.float32)))


def task_of(*, cluster_weights: Sequence[float] = (0.3,), ridges: Sequence[float | None] = (1e-2,)) -> RepairTask:
    """Two clusters; documents 0 to 3 are calibrated on, 4 and 5 are validation text."""
    return RepairTask(
        calibration=[rows_of(0, 1), rows_of(2, 3)],
        validation=[rows_of(4), rows_of(5)],
        weights=WEIGHTS,
        bias=None,
        metric=torch.eye(HIDDEN),
        keeps=[5, 5],
        neuron_ids=IDS,
        cluster_weights=cluster_weights,
        ridges=ridges,
    )


def moments(tokens: LayerTokens, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, y = tokens.activations[rows], tokens.targets[rows]
    return h.T @ h / len(h), h.T @ y / len(h)


def mixed_system(tokens: LayerTokens, weight: float, cluster: int) -> System:
    own = moments(tokens, task_of().calibration[cluster])
    overall = moments(tokens, rows_of(0, 1, 2, 3))
    gram, cross = (weight * one + (1 - weight) * every for one, every in zip(own, overall, strict=True))
    return System(gram=gram, cross=cross, own=WEIGHTS, ridge=1e-2)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_repair_mixes_the_cluster_with_all_text(weight: float) -> None:
    tokens = same_kind_of_text()
    found = repair_layer(tokens, task_of(cluster_weights=(weight,)))
    assert (found.ridge, found.cluster_weight) == (1e-2, weight)
    for cluster, (down, bias) in enumerate(found.solutions):
        ids = torch.from_numpy(IDS[cluster]).long()
        expected = solve(mixed_system(tokens, weight, cluster), ids, [1e-2])[0]
        np.testing.assert_allclose(down, expected, atol=1e-3)
        assert not bias.any()


@pytest.mark.parametrize("options", [{}, {"moment_bytes": 100}, {"neuron_ids": None}, {"cluster_weights": (0.3, 1.0)}])
def test_places_repair_together_as_one_does(options: dict[str, Any]) -> None:
    tokens = tokens_of(correlated(6 * LENGTH, seed=3), random_tensor(6 * LENGTH, HIDDEN, seed=4))
    task = replace(task_of(ridges=(*RIDGES, None)), **options)
    alone = repair_layer(tokens, task)
    for num_places in (2, 3):
        together = repair_layer(tokens, task, num_places)
        assert (together.ridge, together.cluster_weight) == (alone.ridge, alone.cluster_weight)
        for (first, _), (second, _) in zip(alone.solutions, together.solutions, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)


def test_moments_that_do_not_fit_into_memory_are_summed_twice() -> None:
    tokens = same_kind_of_text()
    together = repair_layer(tokens, task_of())
    one_by_one = repair_layer(tokens, replace(task_of(), moment_bytes=100))
    for (first, _), (second, _) in zip(together.solutions, one_by_one.solutions, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)


def test_neurons_are_removed_by_second_order_where_none_are_given() -> None:
    tokens = same_kind_of_text()
    task = replace(task_of(), neuron_ids=None, metric=torch.diag(torch.arange(1.0, HIDDEN + 1)))
    found = repair_layer(tokens, task)
    for cluster, ids in enumerate(found.neuron_ids):
        expected = remove_neurons(mixed_system(tokens, 0.3, cluster), task.metric, keep=5).neuron_ids
        assert ids.tolist() == expected.tolist()


def test_it_is_fitted_to_the_targets_and_not_to_the_own_output() -> None:
    """The narrow model's hidden states are off; the wanted output makes up for that."""
    activations, kept = correlated(6 * LENGTH, seed=3), FFN_DIM - 1
    shifted = random_tensor(kept, HIDDEN, seed=4)
    tokens = tokens_of(activations, activations[:, :kept] @ shifted)
    task = replace(task_of(ridges=(1e-6,)), neuron_ids=[np.arange(kept, dtype=np.int32)] * 2, keeps=[kept] * 2)
    for down, _ in repair_layer(tokens, task).solutions:
        np.testing.assert_allclose(activations[:, :kept] @ down, tokens.targets, atol=0.05)


@pytest.mark.parametrize("ridges", [(1e-2,), (1e-3, 1e-1, None)])
def test_a_cluster_that_keeps_all_keeps_its_own_weights(ridges: tuple[float | None, ...]) -> None:
    tokens = tokens_of(correlated(6 * LENGTH, seed=3), random_tensor(6 * LENGTH, HIDDEN, seed=4))
    found = repair_layer(tokens, replace(task_of(ridges=ridges), neuron_ids=None, keeps=[5, FFN_DIM]))
    assert [len(ids) for ids in found.neuron_ids] == [5, FFN_DIM]
    assert torch.equal(found.solutions[1][0], WEIGHTS)
    alone = repair_layer(tokens, replace(task_of(ridges=(found.ridge,)), neuron_ids=None))
    assert torch.equal(found.solutions[0][0], alone.solutions[0][0])


def test_the_bias_takes_up_the_means() -> None:
    activations = correlated(6 * LENGTH, seed=5) + 3.0
    bias = random_tensor(HIDDEN, seed=6)
    tokens = tokens_of(activations, activations @ WEIGHTS + bias)
    with_bias = repair_layer(tokens, replace(task_of(cluster_weights=(1.0,)), bias=bias))
    for cluster, (down, found) in enumerate(with_bias.solutions):
        rows, ids = task_of().calibration[cluster], torch.from_numpy(IDS[cluster]).long()
        errors = tokens.targets[rows] - tokens.activations[rows][:, ids] @ down - found
        np.testing.assert_allclose(errors.mean(dim=0), torch.zeros(HIDDEN), atol=1e-3)
    (own, kept_bias), _ = repair_layer(tokens, replace(task_of(ridges=(None,)), bias=bias)).solutions
    assert torch.equal(own, WEIGHTS[torch.from_numpy(IDS[0]).long()])
    assert torch.equal(kept_bias, bias)


def cost(tokens: LayerTokens, task: RepairTask, found: Repaired) -> float:
    """Cost of the output errors on validation tokens, in double precision."""
    total = 0.0
    for rows, ids, (down, _) in zip(task.validation, found.neuron_ids, found.solutions, strict=True):
        errors = (tokens.targets[rows] - tokens.activations[rows][:, ids.tolist()] @ down).double()
        total += float(((errors @ task.metric.double()) * errors).sum())
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 1.0, 20.0])
def test_the_ridge_is_the_best_one_on_validation_text(seed: int, noise: float) -> None:
    activations = correlated(6 * LENGTH, seed=seed)
    targets = activations @ WEIGHTS + noise * random_tensor(6 * LENGTH, HIDDEN, seed=seed + 50)
    tokens, task = tokens_of(activations, targets), task_of(ridges=(*RIDGES, 10.0, None))
    costs = {ridge: cost(tokens, task, repair_layer(tokens, replace(task, ridges=(ridge,)))) for ridge in task.ridges}
    found = repair_layer(tokens, task)
    assert found.ridge == min(costs, key=lambda key: costs[key])
    assert cost(tokens, task, found) == pytest.approx(costs[found.ridge])


@pytest.mark.parametrize("given_ids", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_cluster_weight_and_ridge_are_the_best_pair_on_validation_text(seed: int, given_ids: bool) -> None:
    activations = correlated(6 * LENGTH, seed=seed)
    targets = activations @ WEIGHTS + random_tensor(6 * LENGTH, HIDDEN, seed=seed + 50)
    weights, ridges = (0.0, 0.5, 1.0), (*RIDGES, None)
    tokens, task = tokens_of(activations, targets), task_of(cluster_weights=weights, ridges=ridges)
    task = task if given_ids else replace(task, neuron_ids=None)
    costs = {}
    for weight in weights:
        for ridge in ridges:
            alone = repair_layer(tokens, replace(task, cluster_weights=(weight,), ridges=(ridge,)))
            costs[weight, ridge] = cost(tokens, task, alone)
    found = repair_layer(tokens, task)
    assert (found.cluster_weight, found.ridge) == min(costs, key=lambda key: costs[key])
    assert cost(tokens, task, found) == pytest.approx(min(costs.values()))


def two_kinds_of_text() -> LayerTokens:
    """What a dropped neuron says in one cluster's text is the opposite of what it says in the other's."""
    activations = torch.zeros(6 * LENGTH, FFN_DIM)
    activations[:, :5] = random_tensor(6 * LENGTH, 5, seed=1)
    activations[:, 5] = activations[:, 0]
    activations[rows_of(2, 3, 5), 5] *= -1
    return tokens_of(activations)


def test_clusters_that_contradict_each_other_get_all_the_weight() -> None:
    tokens = two_kinds_of_text()
    task = replace(task_of(cluster_weights=(0.0, 0.3, 1.0)), neuron_ids=[np.arange(5, dtype=np.int32)] * 2)
    found = repair_layer(tokens, task)
    assert found.cluster_weight == 1.0
    for sign, (down, _) in zip((1, -1), found.solutions, strict=True):
        np.testing.assert_allclose(down[0], WEIGHTS[0] + sign * WEIGHTS[5], atol=0.05)


def test_without_validation_text_the_first_candidates_are_taken() -> None:
    none = torch.zeros(0, dtype=torch.long)
    task = replace(task_of(cluster_weights=(0.6, 0.3), ridges=(0.5, 0.1, None)), validation=[none, none])
    found = repair_layer(same_kind_of_text(), task)
    assert (found.cluster_weight, found.ridge) == (0.6, 0.5)


def test_a_repair_that_validation_text_contradicts_is_not_shipped() -> None:
    # In calibration text each dropped neuron repeats a kept one, in validation text it does the opposite.
    kept, dropped = [0, 2, 5, 9, 11], [1, 3, 4, 6, 7]
    activations = torch.zeros(6 * LENGTH, FFN_DIM)
    activations[:, kept] = random_tensor(6 * LENGTH, 5, seed=1)
    activations[:, dropped] = activations[:, kept]
    activations[rows_of(4, 5)[:, None], torch.tensor(dropped)] *= -1
    tokens, task = tokens_of(activations), replace(task_of(ridges=(*RIDGES, None)), neuron_ids=[ids_of(*kept)] * 2)
    found = repair_layer(tokens, task)
    assert found.ridge is None
    assert all(torch.equal(down, WEIGHTS[kept]) for down, _ in found.solutions)
    agreeing = repair_layer(tokens, replace(task, validation=[rows_of(2), rows_of(3)]))
    assert agreeing.ridge == min(RIDGES)
    np.testing.assert_allclose(agreeing.solutions[0][0], WEIGHTS[kept] + WEIGHTS[dropped], atol=0.01)
