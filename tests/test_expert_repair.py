"""The repair of narrow experts beside plain least squares over the tokens that were routed to each."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.layer_repair import NarrowInputs
from coreinfer.compiler.prune.narrow import CLUSTERS, Assignment, NarrowModel, from_bits, narrow_downs
from coreinfer.compiler.prune.reconstruct import narrow_all
from coreinfer.compiler.prune.select import Choice
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document, split_point
from coreinfer.runtime.engines.torch.mixture import ExpertRun

from .model_factory import MIXTURES, VOCABULARY, build_model
from .test_config import make_config
from .test_narrow_experts import NEURONS, wide_settings

Floats = np.ndarray[Any, np.dtype[np.float64]]

KEPT = (64, 32, 64)
LABELS = (np.arange(48) % 16 == 3).astype(np.int64)
"""Of the calibration documents: few tokens of cluster 1 go to each expert."""
NUM_VALIDATION, NUM_HELD_OUT = 8, 8
RIDGE = 0.01


@cache
def load(family: str) -> LoadedModel:
    """A model whose second layer never chooses its last expert."""
    model = build_model(family, **wide_settings(family))
    row = family_of_config(model.config.to_dict(), family)
    made = wrap_model(model, None, family=row, name=family, config=model.config)
    mixture = made.mixture(1)
    tensors = mixture.tensors
    mixture.assign({role: tensor for role, tensor in tensors.items() if not role.startswith("experts.5.")})
    mixture.tensors = tensors
    return made


def documents(count: int = len(LABELS) + NUM_VALIDATION + NUM_HELD_OUT) -> list[Document]:
    """Of unlike lengths, so that batches have padding; the last of them for validation and held out."""
    random = np.random.default_rng(0)
    ids = [tuple(random.integers(3, VOCABULARY, length).tolist()) for length in random.integers(40, 80, count)]
    return [Document(text="", routing_text="", token_ids=token_ids) for token_ids in ids]


def inputs_of(family: str, size: int = 1, **options: Any) -> NarrowInputs:
    """Both clusters and a control, which keep neurons of each expert at random."""
    loaded, texts, inner = load(family), documents(), NEURONS[family]
    scores = np.random.default_rng(2).random((2, 3, 6 * inner)).astype(np.float32)
    ids = [[kept_of(layer, kept) for layer, kept in zip(layers, KEPT, strict=True)] for layers in scores]
    nothing = np.zeros(0, np.int64)
    main, one = (
        Assignment(name=name, calibration=labels, validation=labels[:NUM_VALIDATION], held_out=nothing)
        for name, labels in ((CLUSTERS, LABELS), ("one static mask", LABELS * 0))
    )
    return NarrowInputs(
        config=make_config(**{"experts": "narrow", "removal": "top-k", "ridge": RIDGE, **options}),
        team=Alone(loaded, size),
        calibration=texts[: len(LABELS)],
        validation=texts[len(LABELS) : len(LABELS) + NUM_VALIDATION],
        assignments=[main, one],
        choices={
            CLUSTERS: Choice(scores=scores, neuron_ids=ids),
            one.name: Choice(scores=scores[:1], neuron_ids=ids[:1]),
        },
        budgets={CLUSTERS: [[6 * kept for kept in KEPT]] * 2, one.name: [[6 * kept for kept in KEPT]]},
        metrics=torch.eye(32).expand(3, -1, -1),
    )


def kept_of(scores: Any, kept: int) -> Any:
    """The best of each expert's neurons."""
    parts = scores.reshape(6, -1)
    best = [np.sort(np.argsort(-part)[:kept]) + number * parts.shape[1] for number, part in enumerate(parts)]
    return np.concatenate(best).astype(np.int32)


@cache
def narrowed(family: str, size: int = 1) -> Mapping[str, NarrowModel]:
    return narrow_all(inputs_of(family, size), Cache(None), "key", Progress())


@dataclass(kw_only=True)
class Seen:
    """What one expert did: inputs of its down projection, router's weights, and of each token its cluster, and whether
    it is in the second half of its document."""

    activations: list[Floats]
    weights: list[Floats]
    labels: list[int]
    is_late: list[bool]

    def only(self, cluster: int) -> "Seen":
        """Tokens of a cluster that are read narrow."""
        places = [n for n, label in enumerate(self.labels) if label == cluster and self.is_late[n]]
        return Seen(
            activations=[self.activations[n] for n in places],
            weights=[self.weights[n] for n in places],
            labels=[cluster] * len(places),
            is_late=[True] * len(places),
        )


@cache
def watched(family: str, layer: int, first: int, last: int) -> list[Seen]:
    """What a layer's experts do on some documents, which the model reads one by one."""
    loaded = load(family)
    seen = [Seen(activations=[], weights=[], labels=[], is_late=[]) for _ in range(6)]

    def look(run: ExpertRun) -> None:
        seen[run.expert].activations.extend(run.activations.double().numpy())
        seen[run.expert].weights.extend(run.weights.double().numpy())
        seen[run.expert].labels.extend([label] * len(run.rows))
        seen[run.expert].is_late.extend((run.rows >= split_point(len(document.token_ids))).tolist())

    loaded.mixture(layer).watch = look
    try:
        with torch.inference_mode():
            for number, document in enumerate(documents()[first:last]):
                label = int(LABELS[number % len(LABELS)])
                loaded.model(torch.tensor([document.token_ids]))
    finally:
        loaded.mixture(layer).watch = None
    return seen


def own_rows(family: str, layer: int, expert: int) -> tuple[Floats, Floats | None]:
    """An expert's down projection (neurons, hidden size), and its bias."""
    tensors = load(family).mixture(layer).tensors
    bias = tensors.get(expert_role(expert, "down_bias"))
    down = tensors[expert_role(expert, "down")].double().numpy().T
    return down, None if bias is None else bias.double().numpy()


def least_squares(
    seen: Seen, counted: Floats, own: Floats, bias: Floats | None, ids: Any
) -> tuple[Floats, Floats | None]:
    """Fit kept rows, and a bias that no ridge holds.

    Args:
        counted: (tokens,) how much each token counts, before its router's weight.
    """
    activations, roots = np.stack(seen.activations), np.sqrt(counted) * np.stack(seen.weights)
    kept, wanted = activations[:, ids], activations @ own
    columns = kept
    centred = kept - (0 if bias is None else np.average(kept, axis=0, weights=roots**2))
    lam = RIDGE * (np.square(centred * roots[:, None]).sum(axis=0)).mean()
    if bias is not None:
        columns, wanted = np.hstack([kept, np.ones((len(kept), 1))]), wanted + bias
    pull = np.sqrt(lam) * np.eye(len(ids), columns.shape[1])
    found = np.linalg.lstsq(
        np.vstack([columns * roots[:, None], pull]),
        np.vstack([wanted * roots[:, None], np.sqrt(lam) * own[ids]]),
        rcond=None,
    )[0]
    return found[: len(ids)], None if bias is None else found[-1]


def counted_tokens(seen: Seen, cluster: int, kept: int) -> Floats:
    """How much each token of an expert counts: 0.3 and 0.7, unless fewer of the cluster's came than neurons stay."""
    lengths = np.array([len(document.token_ids) for document in documents()[: len(LABELS)]])
    is_own = np.array(seen.labels) == cluster
    share = 0.3 if is_own.sum() >= kept else 0.0
    counted: Floats = share * is_own / lengths[cluster == LABELS].sum() + (1 - share) / lengths.sum()
    return counted


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_refitted_by_least_squares(family: str) -> None:
    narrow, few = narrowed(family)[CLUSTERS], set()
    assert narrow.ridges == (RIDGE,) * 3
    for layer, kept in enumerate(KEPT):
        for expert, seen in enumerate(watched(family, layer, 0, len(LABELS))):
            own, bias = own_rows(family, layer, expert)
            for cluster in range(2):
                found = [*narrow_downs(load(family), narrow, layer, cluster)][expert]
                if (layer, expert) == (1, 5):
                    assert not seen.labels
                    down, expected_bias = own[found.neuron_ids], bias
                else:
                    few.add(seen.labels.count(cluster) < kept)
                    counted = counted_tokens(seen, cluster, kept)
                    down, expected_bias = least_squares(seen, counted, own, bias, found.neuron_ids)
                np.testing.assert_allclose(found.weight.T, down, rtol=2**-8, atol=1e-4)
                assert (expected_bias is None) == (found.bias is None)
                if found.bias is not None and expected_bias is not None:
                    np.testing.assert_allclose(found.bias, expected_bias, rtol=1e-3, atol=1e-4)
    assert few == {False, True}


def output_error(
    family: str, layer: int, seen: Sequence[Seen], narrow: NarrowModel, cluster: int = 0, *, repaired: bool
) -> float:
    """Squared error of a cluster's experts, each on the tokens that were routed to it."""
    total = 0.0
    for found in narrow_downs(load(family), narrow, layer, cluster):
        own, bias = own_rows(family, layer, found.number)
        if not seen[found.number].labels:
            continue
        activations, weights = np.stack(seen[found.number].activations), np.stack(seen[found.number].weights)
        ids = found.neuron_ids
        error = activations @ own - activations[:, ids] @ (found.weight.double().numpy().T if repaired else own[ids])
        if repaired and found.bias is not None:
            error += bias - found.bias.double().numpy()
        total += float(np.square(error * weights[:, None]).sum())
    return total


@pytest.mark.parametrize("family", MIXTURES)
def test_other_text_gains_by_the_repair(family: str) -> None:
    narrow = narrowed(family)[CLUSTERS]
    for layer in range(3):
        seen = watched(family, layer, len(LABELS) + NUM_VALIDATION, len(documents()))
        after, before = (output_error(family, layer, seen, narrow, repaired=repaired) for repaired in (True, False))
        assert after < 0.97 * before


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_places_add_up_to_the_same(family: str) -> None:
    alone, several = narrowed(family), narrowed(family, 3)
    for name, narrow in several.items():
        assert narrow.ridges == alone[name].ridges == (RIDGE,) * 3
        for downs, expected in zip(narrow.downs, alone[name].downs, strict=True):
            for found, other in zip(downs, expected, strict=True):
                assert found is not None
                assert other is not None
                np.testing.assert_allclose(from_bits(found).float(), from_bits(other).float(), rtol=2**-7, atol=1e-4)


def test_a_repair_that_other_text_rejects_is_left_out() -> None:
    """A ridge that is too small fits what little text there is and nothing else."""
    inputs = inputs_of("mixtral", ridge=1e-9)
    inputs = replace(
        inputs,
        calibration=inputs.calibration[:12],
        assignments=[replace(item, calibration=item.calibration[:12]) for item in inputs.assignments],
    )
    narrow = narrow_all(inputs, Cache(None), "key", Progress())
    assert None in narrow[CLUSTERS].ridges
    for name, found in narrow.items():
        assert found.ridges == narrow[CLUSTERS].ridges
        for layer, ridge in enumerate(found.ridges):
            assert all((down is None) == (ridge is None) for down in found.downs[layer]), name


def validation_error(layer: int, narrow: NarrowModel) -> float:
    """Squared error of both clusters' experts on the second halves of the validation text."""
    last = len(LABELS) + NUM_VALIDATION
    seen = watched("granitemoe", layer, len(LABELS), last)
    return sum(
        output_error("granitemoe", layer, [one.only(cluster) for one in seen], narrow, cluster, repaired=True)
        for cluster in range(2)
    )


def test_what_is_chosen_costs_least_on_validation_text() -> None:
    """Of all ridges and both weights of a cluster."""
    inputs = inputs_of("granitemoe", ridge="auto", cluster_weight="auto")
    chosen = narrow_all(inputs, Cache(None), "key", Progress())[CLUSTERS]
    found = {}
    for ridge, weight in itertools.product((1e-3, 1e-2, 1e-1), (0.3, 0.6)):
        alone = replace(inputs, config=replace(inputs.config, ridge=ridge, cluster_weight=weight))
        found[ridge, weight] = narrow_all(alone, Cache(None), "key", Progress())[CLUSTERS]
    for layer in range(3):
        costs = {candidate: validation_error(layer, narrow) for candidate, narrow in found.items()}
        best = min(costs, key=costs.__getitem__)
        assert chosen.ridges[layer] == best[0]
        for downs, expected in zip(chosen.downs[layer], found[best].downs[layer], strict=True):
            np.testing.assert_array_equal(downs, expected)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_cluster_without_some_experts_has_the_others_as_they_are(family: str) -> None:
    """In one layer other experts are missing than in another, and in the other cluster none."""
    inputs, inner = inputs_of(family), NEURONS[family]
    missing = ({1, 4}, {0}, {2, 3, 5})
    choice = inputs.choices[CLUSTERS]
    some = [ids[~np.isin(ids // inner, [*gone])] for ids, gone in zip(choice.neuron_ids[0], missing, strict=True)]
    listed = replace(choice, neuron_ids=[some, choice.neuron_ids[1]], lists_experts=True)
    inputs = replace(inputs, choices={**inputs.choices, CLUSTERS: listed})
    found, expected = narrow_all(inputs, Cache(None), "key", Progress())[CLUSTERS], narrowed(family)[CLUSTERS]
    assert found.choice.lists_experts
    for layer, gone in enumerate(missing):
        for cluster in range(2):
            own = [*narrow_downs(load(family), found, layer, cluster)]
            others = {one.number: one for one in narrow_downs(load(family), expected, layer, cluster)}
            kept = [number for number in range(6) if cluster == 1 or number not in gone]
            assert [one.number for one in own] == found.choice.experts_of(load(family).record, cluster, layer) == kept
            for one in own:
                np.testing.assert_array_equal(one.neuron_ids, others[one.number].neuron_ids)
                torch.testing.assert_close(one.weight, others[one.number].weight, rtol=0, atol=0)
                assert (one.bias is None) == (others[one.number].bias is None)
                if one.bias is not None:
                    torch.testing.assert_close(one.bias, others[one.number].bias, rtol=0, atol=0)
