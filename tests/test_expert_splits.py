"""How many of a layer's experts stay, and how wide: what both cost, and how layers are divided by it."""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import family_of_config
from coreinfer.bundles.manifest import ExpertsRecord
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.mixtures.expert_losses import split_losses
from coreinfer.compiler.prune.mixtures.expert_splits import (
    Split,
    SplitLosses,
    cluster_splits,
    expert_orders,
    expert_widths,
    mean_splits,
    tried_counts,
)
from coreinfer.compiler.prune.mixtures.experts import profile_experts
from coreinfer.compiler.prune.profile import Profile
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document, split_point

from .model_factory import MIXTURES, VOCABULARY
from .skewed_mixtures import NEGLECTED, build_skewed
from .test_config import make_config
from .test_narrow_experts import NEURONS, wide_settings

LABELS = {"clusters": np.arange(24) % 2, "one static mask": np.zeros(24, np.int64)}
CONFIG: dict[str, Any] = {"experts": "both", "budgets": "sensitivity", "keep": 0.5}


def metrics() -> torch.Tensor:
    """Of each layer another, positive definite."""
    roots = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)) / 8
    return roots @ roots.mT + 0.1 * torch.eye(32)


@cache
def load(family: str) -> LoadedModel:
    model = build_skewed(family, **wide_settings(family))
    row = family_of_config(model.config.to_dict(), family)
    return wrap_model(model, None, family=row, name=family, config=model.config)


def documents() -> list[Document]:
    """Of unlike lengths, so that batches have padding."""
    random = np.random.default_rng(0)
    ids = [tuple(random.integers(3, VOCABULARY, length).tolist()) for length in random.integers(40, 80, 24)]
    return [Document(text="", routing_text="", token_ids=token_ids) for token_ids in ids]


@cache
def measured(family: str, size: int = 1, **options: Any) -> Mapping[str, SplitLosses]:
    config, team = make_config(**CONFIG, **options), Alone(load(family), size)
    profile = profile_experts(config, team, documents(), LABELS, Cache(None), "key", Progress())
    return split_losses(config, team, documents(), LABELS, profile, metrics(), Cache(None), "key", Progress())


@cache
def mixture_inputs(family: str, layer: int) -> list[tuple[int, torch.Tensor]]:
    """What enters a layer's mixture in the second half of each document, and the document's number."""
    found: list[tuple[int, torch.Tensor]] = []
    loaded = load(family)
    for number, document in enumerate(documents()):
        rows: list[torch.Tensor] = []
        hook = loaded.mixture(layer).register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0]))
        with torch.inference_mode():
            loaded.model(torch.tensor([document.token_ids]))
        hook.remove()
        entering = rows[0].reshape(-1, 32)[split_point(len(document.token_ids)) :]
        found.append((number, entering))
    return found


def mixed(family: str, layer: int, entering: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """What a mixture of some experts puts out, in other words than the product's."""
    mixture = load(family).mixture(layer)
    with torch.inference_mode():
        # Never chosen, as none of a token's is.
        absent = torch.tensor([number for number in range(6) if number not in kept], dtype=torch.long)
        chosen, weights = mixture.router(entering, absent)
        output = torch.zeros_like(entering)
        for number in kept:
            part = {role: mixture.tensors[expert_role(number, role)] for role in ("gate", "up", "down")}
            biases = {role: mixture.tensors.get(expert_role(number, f"{role}_bias"), 0.0) for role in part}
            neurons = mixture._combine(
                entering @ part["gate"].T + biases["gate"], entering @ part["up"].T + biases["up"]
            )
            own = (weights * (chosen == number)).sum(dim=1, keepdim=True)
            output += own * (neurons @ part["down"].T + biases["down"])
    return output


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_left_out_cost_what_the_output_loses(family: str) -> None:
    losses = measured(family)
    for name, layer in itertools.product(losses, range(3)):
        found = losses[name]
        np.testing.assert_array_equal(found.counts, [2, 3, 4, 5, 6])
        for cluster, place in itertools.product(range(len(found.orders)), range(5)):
            kept = found.orders[cluster, layer, : found.counts[place]].tolist()
            total, num_tokens = 0.0, 0
            for number, entering in mixture_inputs(family, layer):
                if LABELS[name][number] == cluster:
                    error = mixed(family, layer, entering, kept) - mixed(family, layer, entering, [*range(6)])
                    total += 0.5 * float(((error @ metrics()[layer]) * error).sum())
                    num_tokens += len(entering)
            assert found.left_out[cluster, layer, place] == pytest.approx(total / num_tokens, rel=1e-3, abs=1e-7)


def test_the_model_has_its_experts_back() -> None:
    measured("olmoe")
    for layer in range(3):
        mixture = load("olmoe").mixture(layer)
        assert len(mixture.tensors) == 18
        assert len(mixture._absent) == 0


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_narrow_experts_cost_what_their_outputs_lose(family: str) -> None:
    """Without a repair, summed over both clusters; a repair makes it less, and never more."""
    plain, repaired = measured(family, reconstruct=False)["clusters"], measured(family)["clusters"]
    inner = NEURONS[family]
    np.testing.assert_array_equal(plain.widths, [*range(32, inner, 32), inner])
    mixture, metric = load(family).mixture(0), metrics()[0]
    rows = torch.cat([entering for _, entering in mixture_inputs(family, 0)])
    with torch.inference_mode():
        chosen, weights = mixture.router(rows, torch.tensor([], dtype=torch.long))
    shares = plain.num_tokens / plain.num_tokens.sum()
    for number in range(4):
        part = {role: mixture.tensors[expert_role(number, role)] for role in ("gate", "up", "down")}
        biases = {role: mixture.tensors.get(expert_role(number, f"{role}_bias"), 0.0) for role in part}
        own = (weights * (chosen == number)).sum(dim=1, keepdim=True)
        neurons = own * mixture._combine(rows @ part["gate"].T + biases["gate"], rows @ part["up"].T + biases["up"])
        costs = ((part["down"].T @ metric) * part["down"].T).sum(dim=1) * neurons.square().sum(dim=0)
        order = costs.argsort()
        for place, width in enumerate(plain.widths.tolist()):
            gone = order[: inner - width]
            error = neurons[:, gone] @ part["down"].T[gone]
            expected = 0.5 * float(((error @ metric) * error).sum()) / len(rows)
            found = shares @ plain.narrowed[:, 0, number, place]
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-9)
    assert np.all(repaired.narrowed <= plain.narrowed * (1 + 1e-6))
    assert repaired.narrowed.sum() < 0.95 * plain.narrowed.sum()
    assert not repaired.narrowed[..., -1].any()


def test_few_tokens_make_a_repair_worth_less() -> None:
    """Of an expert with fewer tokens than neurons nothing is expected of it."""
    family = "olmoe"
    few = [Document(text="", routing_text="", token_ids=document.token_ids[:24]) for document in documents()[:6]]
    labels = {"clusters": np.arange(6) % 2}
    found = []
    for repairs in (True, False):
        config, team = make_config(**CONFIG, reconstruct=repairs), Alone(load(family))
        profile = profile_experts(config, team, few, labels, Cache(None), "key", Progress())
        losses = split_losses(config, team, few, labels, profile, metrics(), Cache(None), "key", Progress())
        found.append(losses["clusters"].narrowed)
    # No expert was chosen by 96 of the 72 tokens that are read narrow.
    np.testing.assert_array_equal(found[0][..., 2], found[1][..., 2])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_places_add_up_to_the_same(family: str) -> None:
    alone, several = measured(family), measured(family, 3)
    for name, losses in several.items():
        np.testing.assert_array_equal(losses.orders, alone[name].orders)
        np.testing.assert_allclose(losses.left_out, alone[name].left_out, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(losses.narrowed, alone[name].narrowed, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("family", MIXTURES)
def test_neglected_experts_are_last(family: str) -> None:
    for losses in measured(family).values():
        for layer, neglected in enumerate(NEGLECTED):
            assert all({*order[4:].tolist()} == {*neglected} for order in losses.orders[:, layer])


def profile_of(energies: Any, weights: Any) -> Profile:
    """One layer of experts with a neuron each, of clusters with 100 tokens."""
    statistic = np.array(energies, dtype=np.float32)[:, None]
    routed = np.array(weights, dtype=np.float32)[:, None]
    return Profile(
        statistics={"clusters": statistic},
        num_tokens={"clusters": np.full(len(statistic), 100)},
        relative_energies=np.ones((1, 1), np.float32),
        expert_tokens={"clusters": routed},
        expert_weights={"clusters": routed},
    )


def test_a_cluster_puts_last_what_it_hardly_uses() -> None:
    """Though it puts out most in other text; else cluster and all text are mixed."""
    energies = [[9, 1, 5, 0.1], [1, 900, 5, 2]]
    config = make_config(experts="both", cluster_weight=0.3)
    used = expert_orders(config, profile_of(energies, [[50, 5, 40, 5]] * 2), "clusters", 4)
    np.testing.assert_array_equal(used[:, 0], [[1, 0, 2, 3], [1, 2, 0, 3]])
    # A tenth of an even share are 2.5 of 100.
    hardly = expert_orders(config, profile_of(energies, [[50, 2.4, 45, 2.6], [1, 90, 5, 4]]), "clusters", 4)
    np.testing.assert_array_equal(hardly[:, 0], [[0, 2, 3, 1], [1, 2, 3, 0]])
    alone = make_config(experts="both", cluster_weight=1.0)
    own = expert_orders(alone, profile_of(energies, [[25] * 4] * 2), "clusters", 4)
    np.testing.assert_array_equal(own[:, 0], [[0, 2, 1, 3], [1, 2, 3, 0]])


def random_losses(num_layers: int, num_clusters: int = 2) -> SplitLosses:
    """Of 5 experts, 2 a token, of 96 neurons; costs fall with experts and widths."""
    random = np.random.default_rng(num_layers)
    shape = (num_clusters, num_layers)
    left_out = -np.sort(-(random.random((*shape, 4)) ** 3), axis=-1)
    left_out[..., -1] = 0
    narrowed = -np.sort(-(random.random((*shape, 5, 3)) ** 3), axis=-1)
    narrowed[..., -1] = 0
    return SplitLosses(
        num_tokens=np.array([300, 100][:num_clusters]),
        orders=np.argsort(random.random((*shape, 5)), axis=-1),
        counts=np.array([2, 3, 4, 5]),
        left_out=left_out,
        widths=np.array([32, 64, 96]),
        narrowed=narrowed,
        tokens=random.random((*shape, 5)) * 100,
    )


def loss_of(losses: SplitLosses, cluster: int, layer: int, split: Split) -> float:
    """By the definition in docs/method.md."""
    order, tokens = losses.orders[cluster, layer].tolist(), losses.tokens[cluster, layer]
    kept = order[: split.num_experts]
    load = sum(tokens) / max(1.0, sum(tokens[number] for number in kept))
    narrow = sum(losses.narrowed[cluster, layer, number, split.width // 32 - 1] for number in kept)
    return float(losses.left_out[cluster, layer, split.num_experts - 2] + load * narrow)


ALL = [Split(num_experts=count, width=width) for count in range(2, 6) for width in (32, 64, 96)]


@pytest.mark.parametrize("keep", [0.2, 0.35, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("budgets", ["sensitivity", "uniform"])
def test_divisions_lose_little(budgets: Any, keep: float) -> None:
    """Of two layers, within a tenth of the best of all divisions that fit, each layer for itself where asked."""
    losses, config = random_losses(2), make_config(experts="both", budgets=budgets, keep=keep, min_layer_keep=0.1)
    budget = round(keep * 480)
    for cluster in range(2):
        found = cluster_splits(config, losses, cluster, [budget] * 2)
        pairs = [
            pair
            for pair in itertools.product(ALL, repeat=2)
            if sum(split.num_neurons for split in pair) <= 2 * budget
            and (budgets != "uniform" or all(split.num_neurons <= budget for split in pair))
        ]
        costs = [sum(loss_of(losses, cluster, layer, split) for layer, split in enumerate(pair)) for pair in pairs]
        assert tuple(found) in pairs
        own = costs[pairs.index((found[0], found[1]))]
        assert own <= 1.1 * min(costs) + 1e-6
        if budgets == "uniform":
            assert own == pytest.approx(min(costs), rel=1e-6)


@pytest.mark.parametrize("room", [(1, 1), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("budgets", ["sensitivity", "uniform"])
def test_divisions_by_what_a_token_reads_lose_little(budgets: Any, room: tuple[int, int]) -> None:
    """Widths alone are divided, within a tenth of the best that fit; then 2% at most are lost for fewer experts."""
    losses = random_losses(2)
    config = make_config(experts="both", budgets=budgets, keep=None, budget_mb=1.0, min_layer_keep=0.1)
    for cluster in range(2):
        found = cluster_splits(config, losses, cluster, [5 * 32 * blocks for blocks in room])
        widths = [split.width // 32 for split in found]
        assert sum(widths) <= sum(room)
        assert budgets != "uniform" or all(width <= own for width, own in zip(widths, room, strict=True))

        def least(pair: Sequence[int], cluster: int = cluster) -> float:
            options = [[split for split in ALL if split.width == 32 * blocks] for blocks in pair]
            costs = [min(loss_of(losses, cluster, layer, split) for split in own) for layer, own in enumerate(options)]
            return sum(costs)

        pairs = [
            pair
            for pair in itertools.product((1, 2, 3), repeat=2)
            if sum(pair) <= sum(room) and (budgets != "uniform" or all(a <= b for a, b in zip(pair, room, strict=True)))
        ]
        assert least(widths) <= 1.1 * min(map(least, pairs))
        own = sum(loss_of(losses, cluster, layer, split) for layer, split in enumerate(found))
        assert own <= 1.02 * least(widths) + 1e-9


def test_experts_that_cost_little_go_though_a_token_reads_no_less() -> None:
    """Up to 2% of what narrowing costs; none where all neurons fit."""
    losses = random_losses(3)
    losses.orders[:] = range(5)
    losses.tokens[:] = [100, 100, 0, 0, 0]
    losses.narrowed[:] = 0
    losses.narrowed[:, :, :2] = [0.4, 0.1, 0]
    losses.left_out[:] = [[9, 9, 0.01, 0], [9, 0.001, 0, 0], [9, 9, 0.05, 0]]
    config = make_config(experts="both", budgets="sensitivity", keep=None, budget_mb=1.0)
    found = cluster_splits(config, losses, 0, [5 * 64] * 3)
    assert found == [Split(num_experts=count, width=64) for count in (4, 3, 5)]
    found = cluster_splits(config, losses, 0, [5 * 64, 5 * 64, 5 * 32])
    assert sum(split.width for split in found) == 5 * 32
    losses.left_out[:] = 0
    assert cluster_splits(config, losses, 0, [5 * 96] * 3) == [Split(num_experts=5, width=96)] * 3


def test_a_mean_division_weighs_clusters_by_their_tokens() -> None:
    losses, config = random_losses(1), make_config(experts="both", budgets="uniform", keep=0.5)
    (found,) = mean_splits(config, losses, [240])
    costs = {
        split: 3 * loss_of(losses, 0, 0, split) + loss_of(losses, 1, 0, split)
        for split in ALL
        if split.num_neurons <= 240
    }
    assert found == min(costs, key=lambda split: costs[split])


def test_all_stay_where_there_is_room() -> None:
    """Also those that this text never used."""
    losses, config = random_losses(3), make_config(experts="both", budgets="sensitivity", keep=1.0)
    losses.left_out[...] = 0
    assert cluster_splits(config, losses, 0, [480] * 3) == [Split(num_experts=5, width=96)] * 3


def test_less_than_the_least_is_the_least() -> None:
    losses = random_losses(2)
    config = make_config(experts="both", budgets="sensitivity", keep=0.05, min_layer_keep=0.0)
    assert cluster_splits(config, losses, 1, [24] * 2) == [Split(num_experts=2, width=32)] * 2


def test_a_layer_keeps_its_least_share() -> None:
    losses, config = random_losses(3), make_config(experts="both", budgets="sensitivity", keep=0.4, min_layer_keep=0.3)
    for cluster in range(2):
        found = cluster_splits(config, losses, cluster, [192] * 3)
        assert min(split.num_neurons for split in found) >= 0.3 * 480
        assert sum(split.num_neurons for split in found) <= 3 * 192


def test_what_is_tried() -> None:
    counts = tried_counts(ExpertsRecord(num_experts=128, num_chosen=8, normalizes=True))
    assert (counts[0], counts[-1], len(counts)) == (8, 128, 16)
    few = tried_counts(ExpertsRecord(num_experts=8, num_chosen=2, normalizes=True))
    np.testing.assert_array_equal(few, [*range(2, 9)])
    np.testing.assert_array_equal(expert_widths(100), [32, 64, 96, 100])
    np.testing.assert_array_equal(expert_widths(24), [24])
