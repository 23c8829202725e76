from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler import CompileConfig
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.prune.select import cheapest_budgets, choose_neurons, cluster_scores, layer_budgets

from .test_config import make_config

LAYERS, FFN_DIM = 6, 256
Floats = npt.NDArray[np.float32]


def profile_of(relative_energies: Floats) -> Profile:
    return Profile(statistics={}, num_tokens={}, relative_energies=relative_energies)


def random_energies(seed: int, *, num_layers: int = LAYERS, ffn_dim: int = FFN_DIM) -> Floats:
    generator = np.random.default_rng(seed)
    layers = generator.uniform(0.1, 4, size=(num_layers, 1))
    return np.asarray(layers * generator.exponential(size=(num_layers, ffn_dim)), dtype=np.float32)


def budgets_of(energies: Floats, norms: Floats | None = None, **options: Any) -> list[int]:
    config = make_config(**{"budgets": "energy", **options})
    return layer_budgets(
        config, config.effective_keep, profile_of(energies), np.ones_like(energies) if norms is None else norms
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.2, 0.33, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("shape", [(6, 256), (30, 1536), (3, 96)])
def test_energy_budgets_make_up_the_keep_ratio(shape: tuple[int, int], keep: float, seed: int) -> None:
    num_layers, ffn_dim = shape
    budgets = budgets_of(random_energies(seed, num_layers=num_layers, ffn_dim=ffn_dim), keep=keep, min_layer_keep=0.15)
    floor = max(32, round(0.15 * ffn_dim / 32) * 32)
    assert len(budgets) == num_layers
    assert sum(budgets) == max(round(keep * ffn_dim * num_layers / 32) * 32, floor * num_layers)
    assert all(budget % 32 == 0 and floor <= budget <= ffn_dim for budget in budgets)


def test_layers_with_more_energy_keep_more() -> None:
    energies = random_energies(1)[:1] * np.array([1, 2, 4, 8, 16, 32], dtype=np.float32)[:, None]
    budgets = budgets_of(energies, keep=0.5, min_layer_keep=0.1)
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[-1]
    norms = np.ones_like(energies) * np.array([32, 16, 8, 4, 2, 1], dtype=np.float32)[:, None]
    by_output = budgets_of(energies, norms, keep=0.5, min_layer_keep=0.1)
    assert by_output == sorted(by_output, reverse=True)
    assert by_output[0] > by_output[-1]


def test_layers_keep_in_proportion_to_the_root_of_their_energy() -> None:
    roots = np.array([1, 2, 3, 4], dtype=np.float32)[:, None]
    energies = np.repeat(roots**2, 1024, axis=1)
    # 0.2, 0.4, 0.6 and 0.8 of 1024 neurons, rounded to blocks by largest remainder.
    assert budgets_of(energies, keep=0.5, min_layer_keep=0.1) == [192, 416, 608, 832]
    halved = budgets_of(energies, np.repeat(1 / roots, 1024, axis=1), keep=0.5, min_layer_keep=0.1)
    assert halved == [512] * 4


@pytest.mark.parametrize("keep", [0.15, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("silent", [1, 3, 5])
def test_layers_without_energy_keep_one_block_within_the_keep_ratio(silent: int, keep: float) -> None:
    energies = random_energies(4)
    energies[:silent] = 0
    budgets = budgets_of(energies, keep=keep, min_layer_keep=0.0)
    assert sum(budgets) == round(keep * FFN_DIM * LAYERS / 32) * 32
    assert min(budgets) >= 32
    assert all(budget % 32 == 0 for budget in budgets)


def test_equal_layers_share_equally() -> None:
    energies = np.repeat(random_energies(2)[:1], 4, axis=0)
    assert budgets_of(energies, keep=0.5, min_layer_keep=0.0) == [128] * 4


def test_a_whole_layer_takes_no_more() -> None:
    energies = np.full((2, 128), 1.0, dtype=np.float32)
    energies[0] *= 1e6
    assert budgets_of(energies, keep=0.75, min_layer_keep=0.0) == [128, 64]


@pytest.mark.parametrize("budgets", ["uniform", "energy"])
def test_keep_one_keeps_all(budgets: str) -> None:
    assert budgets_of(random_energies(0), keep=1.0, budgets=budgets) == [FFN_DIM] * LAYERS


@pytest.mark.parametrize(("keep", "expected"), [(0.01, 32), (0.5, 128), (0.55, 128), (0.57, 160), (0.99, 256)])
def test_uniform_budgets_ignore_energies(keep: float, expected: int) -> None:
    assert budgets_of(random_energies(0), keep=keep, budgets="uniform", min_layer_keep=1.0) == [expected] * LAYERS


def test_a_floor_above_the_keep_ratio_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--min-layer-keep 0\.6: expected at most --keep 0\.5"):
        budgets_of(random_energies(0), keep=0.5, min_layer_keep=0.6)
    assert budgets_of(random_energies(0), keep=0.5, min_layer_keep=0.5) == [128] * LAYERS


def statistics() -> tuple[Floats, npt.NDArray[np.int64], Floats]:
    generator = np.random.default_rng(3)
    sums = generator.exponential(size=(3, 2, 64)) * 100
    norms = generator.uniform(0.5, 2, size=(2, 64))
    return sums.astype(np.float32), np.array([10, 40, 50]), norms.astype(np.float32)


def unit_rms(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(scores / np.sqrt(np.mean(scores**2, axis=-1, keepdims=True)))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("selection", ["output-aware", "griffin", "coreinfer"])
def test_scores_mix_the_cluster_with_all_text(selection: str, weight: float) -> None:
    sums, counts, norms = statistics()
    got = cluster_scores(make_config(selection=selection, cluster_weight=weight), sums, counts, norms)
    for cluster in range(3):
        mean = weight * sums[cluster] / counts[cluster] + (1 - weight) * sums.sum(axis=0) / 100
        expected = {"coreinfer": mean, "griffin": np.sqrt(mean), "output-aware": np.sqrt(mean) * norms}[selection]
        np.testing.assert_allclose(got[cluster], unit_rms(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "weight"), [({}, 0.3), ({"selection": "griffin"}, 1.0), ({"selection": "coreinfer"}, 1.0)]
)
def test_default_weights(options: dict[str, Any], weight: float) -> None:
    sums, counts, norms = statistics()
    default = cluster_scores(make_config(**options), sums, counts, norms)
    stated = cluster_scores(make_config(**options, cluster_weight=weight), sums, counts, norms)
    np.testing.assert_array_equal(default, stated)


def test_weight_zero_gives_every_cluster_the_same_neurons() -> None:
    sums, counts, norms = statistics()
    same = choose_neurons(make_config(cluster_weight=0.0), sums, counts, norms, [[32, 32]] * 3)
    own = choose_neurons(make_config(cluster_weight=1.0), sums, counts, norms, [[32, 32]] * 3)
    for layer in range(2):
        assert len({ids[layer].tobytes() for ids in same.neuron_ids}) == 1
        assert len({ids[layer].tobytes() for ids in own.neuron_ids}) == 3


def test_the_highest_scores_are_kept_within_each_budget() -> None:
    sums, counts, norms = statistics()
    choice = choose_neurons(make_config(), sums, counts, norms, [[32, 64]] * 3)
    for cluster, layers in enumerate(choice.neuron_ids):
        assert [len(ids) for ids in layers] == [32, 64]
        scores = choice.scores[cluster, 0]
        dropped = np.setdiff1d(np.arange(64), layers[0])
        assert scores[layers[0]].min() >= scores[dropped].max()
        assert (np.diff(layers[0]) > 0).all()
        assert layers[0].dtype == np.int32


def test_an_empty_cluster_has_the_scores_of_all_text() -> None:
    sums, counts, norms = statistics()
    sums[1], counts[1] = 0, 0
    config: CompileConfig = make_config()
    got = cluster_scores(config, sums, counts, norms)
    expected = cluster_scores(make_config(cluster_weight=0.0), sums, counts, norms)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)


def total_cost(curves: Floats, budgets: list[int]) -> float:
    return sum(float(curve[(FFN_DIM - budget) // 32]) for curve, budget in zip(curves, budgets, strict=True))


def rising_curves(seed: int, *, convex: bool, num_layers: int = 3) -> Floats:
    steps = np.random.default_rng(seed).exponential(size=(num_layers, FFN_DIM // 32 - 1))
    if convex:
        steps = np.sort(steps, axis=1)
    return np.concatenate([np.zeros((num_layers, 1)), np.cumsum(steps, axis=1)], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75])
def test_cheapest_budgets_cost_least_of_all(seed: int, keep: float) -> None:
    curves = rising_curves(seed, convex=True)
    budgets = cheapest_budgets(curves, keep, 0.1, FFN_DIM)
    num_removed = round(3 * FFN_DIM * (1 - keep) / 32)
    assert sum(budgets) == 3 * FFN_DIM - 32 * num_removed
    removals = [r for r in product(range(8), repeat=3) if sum(r) == num_removed]
    least = min(total_cost(curves, [FFN_DIM - 32 * blocks for blocks in removal]) for removal in removals)
    assert total_cost(curves, budgets) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(5))
def test_budgets_of_any_curves_make_up_the_keep_ratio_above_the_floor(seed: int) -> None:
    budgets = cheapest_budgets(rising_curves(seed, convex=False, num_layers=7), 0.5, 0.3, FFN_DIM)
    assert sum(budgets) == 7 * FFN_DIM // 2
    assert min(budgets) >= 96
    assert all(budget % 32 == 0 for budget in budgets)


def test_a_cheap_stretch_behind_a_dear_block_is_found() -> None:
    dear_first = np.array([0, 5, 5, 5, 5, 5, 5, 5], dtype=np.float32)
    steady = np.arange(8, dtype=np.float32)
    # Seven blocks for 5 are cheaper than the four cheapest of the other layer and three more.
    assert cheapest_budgets(np.stack([dear_first, steady]), 9 / 16, 0.0, FFN_DIM) == [32, FFN_DIM]


def test_sensitivity_budgets_follow_the_curves() -> None:
    config = make_config(budgets="sensitivity", keep=0.7)
    curves = rising_curves(1, convex=True) * np.array([[1], [10], [100]], dtype=np.float32)
    budgets = layer_budgets(
        config, 0.5, profile_of(np.ones((3, FFN_DIM), np.float32)), np.ones((3, FFN_DIM), np.float32), curves
    )
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[-1]
