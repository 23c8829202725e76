"""One layer of one assignment: what its repair is asked for, and its result in the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from coreinfer.compiler.budget import moment_bytes
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.quantize.rounding import Rounding
from coreinfer.compiler.team.dealing import Stepwise
from coreinfer.compiler.team.team import Team
from coreinfer.compiler.text.corpus import Document

from .candidates import Ids
from .dealt import DealtText, Find
from .layer_results import LayerResult, arrays_of, results_of
from .narrow import Assignment, bf16_bits
from .own_down import own_down
from .repair import CLUSTER_WEIGHTS, RIDGES, Known, Repaired, RepairTask, repair_layer
from .select import Choice
from .sums import Sums

__all__ = [
    "NarrowInputs",
    "Results",
    "candidate_ridges",
    "candidate_weights",
    "find_results",
    "own_result",
    "repair_assignment",
    "store_results",
]

Results = dict[str, LayerResult]
"""Assignment name -> one layer's result."""


@dataclass(frozen=True, kw_only=True)
class NarrowInputs:
    """What the narrow models are made from.

    Attributes:
        calibration, validation: documents; the assignments say which cluster each belongs to.
        assignments: the clusters first, then the controls.
        choices: assignment name -> scores, and the neurons that the scores alone would keep.
        budgets: budgets[assignment name][cluster][layer], how many neurons are kept.
        metrics: (layers, hidden size, hidden size) what errors in the FFN outputs cost.
        sums: where sums over the text are kept while the same text is narrowed again; None to sum each time.
        candidates: of each layer, the neurons that may stay; see `layer_candidates`. Empty where all may.
        rounding: how matrices will be stored, so that a layer makes up for the rounding of those before it too; None
            to leave it out of account.
    """

    config: CompileConfig
    team: Team
    calibration: Sequence[Document]
    validation: Sequence[Document]
    assignments: Sequence[Assignment]
    choices: dict[str, Choice]
    budgets: Mapping[str, Sequence[Sequence[int]]]
    metrics: torch.Tensor
    sums: Sums | None = None
    candidates: Sequence[Ids | None] = ()
    rounding: Rounding | None = None

    def candidates_of(self, layer: int) -> Ids | None:
        """The neurons of a layer that may stay, ascending; None where all may."""
        return self.candidates[layer] if self.candidates else None

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.team.loaded


def find_results(inputs: NarrowInputs, cache: Cache, key: str) -> Results | None:
    """Look up a layer's results."""
    arrays = cache.find_arrays(key)
    return None if arrays is None else results_of(arrays, [item.name for item in inputs.assignments])


def store_results(cache: Cache, key: str, results: Results) -> Results:
    """Keep a layer's results, which are then read from their file."""
    arrays = cache.arrays(key, partial(arrays_of, results))
    return results_of(arrays, list(results))


def repair_assignment(
    inputs: NarrowInputs,
    layer: int,
    name: str,
    text: DealtText,
    finds: Mapping[int, Find],
    clusters: LayerResult | None,
    known: Known | None = None,
) -> Stepwise[LayerResult]:
    """Narrow one layer for one assignment; a control goes by what the clusters chose for themselves.

    Args:
        text: all places' text.
        finds, known: of `repair_layer`.
        clusters: the clusters' result, for a control.
    """
    config = inputs.config
    keeps = [budgets[layer] for budgets in inputs.budgets[name]]
    if min(keeps) == inputs.loaded.record.ffn_dim:
        return own_result(inputs, name, layer)
    module = inputs.loaded.projection(layer, "down")
    ridges, cluster_weights = candidate_ridges(config), candidate_weights(config)
    if clusters is not None:
        # Asked to choose for themselves, controls chose the same ridge in nearly every layer (docs/dev/log.md).
        ridges, cluster_weights = (clusters.ridge,), (clusters.cluster_weight,)
    by_scores, candidates = [layers[layer] for layers in inputs.choices[name].neuron_ids], inputs.candidates_of(layer)
    task = RepairTask(
        calibration=text.calibration_tokens[name],
        validation=text.validation_tokens[name],
        own=partial(own_down, layer=layer, candidates=candidates),
        shape=(
            inputs.loaded.record.ffn_dim if candidates is None else len(candidates),
            inputs.loaded.record.hidden_size,
        ),
        has_bias=module.bias is not None,
        metric=inputs.metrics[layer].to(inputs.loaded.device),
        keeps=keeps,
        neuron_ids=None if config.effective_removal == "second-order" else by_scores,
        cluster_weights=cluster_weights,
        ridges=ridges,
        # As they are stored.
        dtype=torch.bfloat16,
        moment_bytes=moment_bytes(config),
    )
    repaired = yield from repair_layer(inputs.team, finds, task, known)
    return _result(repaired, candidates, has_bias=task.has_bias)


def candidate_ridges(config: CompileConfig) -> tuple[float | None, ...]:
    """Candidates for the ridge; none at all is one, so that a repair which other text rejects is not shipped."""
    chosen = RIDGES if (ridge := config.effective_ridge) == "auto" else (float(ridge),)
    return (*chosen, None)


def candidate_weights(config: CompileConfig) -> tuple[float, ...]:
    """Candidates: moments of one cluster alone are too few for a repair, for every kind of score."""
    if config.chooses_cluster_weight:
        return CLUSTER_WEIGHTS
    given = config.cluster_weight
    return CLUSTER_WEIGHTS[:1] if given is None or given == "auto" else (given,)


def _result(repaired: Repaired, candidates: Ids | None, *, has_bias: bool) -> LayerResult:
    solutions = repaired.solutions if repaired.ridge is not None else []
    return LayerResult(
        neuron_ids=tuple(ids if candidates is None else candidates[ids] for ids in repaired.neuron_ids),
        ridge=repaired.ridge,
        cluster_weight=repaired.cluster_weight,
        downs=tuple(bf16_bits(down) for down, _ in solutions),
        biases=tuple(bias.cpu().numpy() for _, bias in solutions) if has_bias else (),
    )


def own_result(inputs: NarrowInputs, name: str, layer: int) -> LayerResult:
    """A layer that keeps its own weights, and the neurons that the scores choose."""
    return LayerResult(
        neuron_ids=tuple(layers[layer] for layers in inputs.choices[name].neuron_ids),
        ridge=None,
        cluster_weight=candidate_weights(inputs.config)[0],
    )
