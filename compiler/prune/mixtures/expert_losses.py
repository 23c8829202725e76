"""Stage `split`: what it costs a layer of a mixture to do without experts, and its experts to be narrower.

Costs are 1/2 d^T F d of the error d of the layer's output (`sensitivity`; with F the identity where nothing else asks
for it), over what is read narrow, the second halves of documents. Without experts d is measured: the router chooses
among those that are left. What narrowing an expert costs after its repair is what second-order removal adds up to on
all calibration text, times (n + k) / (n - k) with n tokens and k neurons, as least squares of so many numbers loses on
text that it was not fitted to (Akaike's final prediction error); without a repair, or where that is less, what the
neurons with the lowest scores put out. Clusters scale it by what they make of the expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.layerwise import Batch, document_starts, layer_output, pick
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.prune.own_down import OwnDown
from coreinfer.compiler.prune.profile import Profile, spread_over_clusters
from coreinfer.compiler.prune.removal import BLOCK, remove_neurons
from coreinfer.compiler.prune.rows import narrow_tokens
from coreinfer.compiler.prune.triangle import unpack_upper
from coreinfer.compiler.samples import SPLIT_TOKENS
from coreinfer.compiler.team.adding import Arrays, add_arrays, add_up
from coreinfer.compiler.team.dealing import deal, home, in_turn
from coreinfer.compiler.team.passage import WALK, Passage, begin_passages, lengths_of, without_text
from coreinfer.compiler.team.team import Pending, Shared, Team, Worker, forget
from coreinfer.compiler.text.corpus import Document
from coreinfer.runtime.engines.torch.mixture import Mixture
from torch import nn

from .expert_repair import own_expert_down, refit_problem, sums_over
from .expert_splits import SplitLosses, expert_energies, expert_orders, expert_widths, tried_counts
from .expert_text import expert_tokens
from .text_walk import walk_of

__all__ = ["split_losses"]

_STAGE = "split"
_LEAST_DOCUMENTS = 8

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def split_losses(
    config: CompileConfig,
    team: Team,
    documents: Sequence[Document],
    assignments: Mapping[str, Labels],
    profile: Profile,
    metrics: torch.Tensor,
    cache: Cache,
    key: str,
    progress: Progress,
) -> dict[str, SplitLosses]:
    """Measure what the clusters of all assignments lose by fewer and narrower experts; nothing if packs have not both.

    Args:
        documents: calibration text only.
        assignments: name -> (documents,) cluster ids, the clusters first.
        metrics: (layers, hidden size, hidden size) what errors in the outputs cost: Fisher matrices, or identities.
        key: of the profile.
    """
    if config.experts != "both":
        return {}
    # Where all neurons are kept there are identities, whatever else is asked for.
    is_weighed = not torch.equal(metrics[0], torch.eye(metrics.shape[-1]))
    key = stage_key("split", upstream=key, weighed=is_weighed, repaired=config.reconstruct)
    record = team.loaded.record
    assert record.experts is not None
    num_experts, counts = record.experts.num_experts, tried_counts(record.experts)
    orders = {name: expert_orders(config, profile, name, num_experts) for name in assignments}
    widths = expert_widths(record.expert_neurons)
    text = _sample(documents, assignments, orders, counts)

    def compute() -> dict[str, Any]:
        with progress.stage(_STAGE, record.num_layers * (num_experts + 1)) as advance:
            curves = _curves(team, documents, metrics, widths, advance, repairs=config.reconstruct)
            return {"curves": curves, **_left_out(team, text, metrics, advance)}

    arrays = cache.arrays(key, compute)
    return {
        name: SplitLosses(
            num_tokens=profile.num_tokens[name],
            orders=orders[name],
            counts=counts,
            left_out=arrays[f"left_out.{name}"],
            widths=widths,
            narrowed=_shares_of(profile, name, num_experts)[..., None] * arrays["curves"],
            tokens=profile.expert_tokens[name].astype(np.float64),
        )
        for name in assignments
    }


def _shares_of(profile: Profile, name: str, num_experts: int) -> Floats:
    """What each expert puts out in a cluster, beside what it does in all text: (clusters, layers, experts)."""
    own, counts = expert_energies(profile, name, num_experts), profile.num_tokens[name]
    overall = np.average(own, axis=0, weights=counts if counts.sum() else None)
    return np.asarray(own / np.maximum(overall, 1e-300))


# What narrower experts lose.


def _curves(
    team: Team,
    documents: Sequence[Document],
    metrics: torch.Tensor,
    widths: Labels,
    advance: Advance,
    *,
    repairs: bool,
) -> Floats:
    """Costs of each expert at all widths over all text, a token of it: (layers, experts, widths)."""
    record = team.loaded.record
    assert record.experts is not None
    dealt = deal(lengths_of(documents), team)
    passages = begin_passages(team, {place: [documents[index] for index in ids] for place, ids in dealt.items()})
    num_tokens = int(narrow_tokens(document_starts(documents)).sum())
    shared = [team.share(metric) for metric in metrics]
    tasks = [
        _CurveTask(layer=layer, expert=expert, widths=widths, num_tokens=num_tokens, repairs=repairs)
        for layer in range(record.num_layers)
        for expert in range(record.experts.num_experts)
    ]

    def ask(task: _CurveTask) -> Pending[Floats]:
        parts = {
            place: team.call(place, _STAGE, _own_sums, own, task.layer, task.expert) for place, own in passages.items()
        }
        total = add_up(team, _STAGE, add_arrays, parts)
        return team.call(home(team, task.expert), _STAGE, _curve, task, shared[task.layer], total)

    curves = []
    for _, curve in in_turn(team, tasks, ask):
        curves.append(curve.result())
        advance()
    forget(team, _STAGE, WALK)
    return np.stack(curves).reshape(record.num_layers, record.experts.num_experts, -1)


@dataclass(frozen=True, kw_only=True)
class _CurveTask:
    """One expert.

    Attributes:
        num_tokens: that are read narrow, whichever experts they chose.
    """

    layer: int
    expert: int
    widths: Labels
    num_tokens: int
    repairs: bool


@torch.inference_mode()
def _own_sums(worker: Worker, passage: Shared[Passage], layer: int, expert: int) -> Arrays:
    """A place's sums over the tokens that are read narrow and chose an expert."""
    tokens = expert_tokens(worker, passage, layer, expert)
    is_narrow = torch.from_numpy(narrow_tokens(document_starts(passage.value().documents))).to(tokens.rows.device)
    return {**sums_over(tokens, is_narrow[tokens.rows].nonzero()[:, 0])}


@torch.inference_mode()
def _curve(worker: Worker, task: _CurveTask, metric: Shared[torch.Tensor], sums: Arrays) -> Floats:
    """What an expert loses at each width: (widths,)."""
    own = own_expert_down(worker, task.layer, task.expert)
    costs, num_chosen = metric.value().to(own.weights.device), float(sums["counts"])
    means = {name: value / max(1, task.num_tokens) for name, value in sums.items()}
    plain = _plain_costs(unpack_upper(means["grams"], len(own.weights)), own, costs, task.widths)
    if not task.repairs or num_chosen <= task.widths[0]:
        return plain
    return np.minimum(plain, _repaired_costs(means, own, costs, task.widths, num_chosen))


def _plain_costs(gram: torch.Tensor, own: OwnDown, metric: torch.Tensor, widths: Labels) -> Floats:
    """Costs of leaving out the neurons with the lowest scores, with all other weights as they are."""
    products = gram * (own.weights @ metric @ own.weights.T)
    order = products.diagonal().argsort()
    products = products[order][:, order]
    removed = [len(order) - int(width) for width in widths]
    return np.array([0.5 * float(products[:count, :count].sum(dtype=torch.float64)) for count in removed])


def _repaired_costs(means: Arrays, own: OwnDown, metric: torch.Tensor, widths: Labels, num_tokens: float) -> Floats:
    """Costs of removing neurons by second order, as text that the repair was not fitted to loses them."""
    problem, inner = refit_problem(means, own), len(own.weights)
    losses = 0.5 * remove_neurons(problem.system, metric, keep=int(widths[0]), step=BLOCK).losses
    left = np.maximum(inner - BLOCK * np.arange(len(losses)), widths[0])
    fitted = np.interp(widths, left[::-1], losses[::-1])
    too_few = num_tokens <= widths
    factors = (num_tokens + widths) / np.where(too_few, 1, num_tokens - widths)
    return np.where(widths == inner, 0.0, np.where(too_few, np.inf, factors * fitted))


# What layers lose without some experts.


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Documents, or one place's; no other text has its key.

    Attributes:
        labels: assignment name -> (documents,) clusters.
        orders, counts: of `SplitLosses`; orders by assignment name.
    """

    key: str
    documents: Sequence[Document]
    labels: Mapping[str, Labels]
    orders: Mapping[str, Labels]
    counts: Labels

    def of(self, ids: Labels) -> "_Text":
        """Some of the documents."""
        return _Text(
            key=uuid4().hex,
            documents=without_text([self.documents[index] for index in ids]),
            labels={name: own[ids] for name, own in self.labels.items()},
            orders=self.orders,
            counts=self.counts,
        )

    @property
    def owners(self) -> dict[str, Labels]:
        """Clusters of all tokens, those that are not read narrow -1: assignment name -> (tokens,)."""
        starts = document_starts(self.documents)
        is_narrow = narrow_tokens(starts)
        return {name: np.where(is_narrow, np.repeat(own, np.diff(starts)), -1) for name, own in self.labels.items()}


def _sample(
    documents: Sequence[Document], assignments: Mapping[str, Labels], orders: Mapping[str, Labels], counts: Labels
) -> _Text:
    text = _Text(key="", documents=documents, labels=assignments, orders=orders, counts=counts)
    first = next(iter(assignments.values()))
    return text.of(spread_over_clusters(documents, first, SPLIT_TOKENS, least=_LEAST_DOCUMENTS))


def _left_out(team: Team, text: _Text, metrics: torch.Tensor, advance: Advance) -> dict[str, Floats]:
    """Costs a token: `left_out.` and assignment name -> (clusters, layers, counts)."""
    dealt = deal(lengths_of(text.documents), team, next(iter(text.labels.values())))
    parts = {place: team.share(text.of(ids)) for place, ids in dealt.items()}

    def ask(layer: int) -> Pending[Arrays]:
        metric = team.share(metrics[layer])
        costs = {place: team.call(place, _STAGE, _layer_costs, own, metric, layer) for place, own in parts.items()}
        return add_up(team, _STAGE, add_arrays, costs)

    found: list[Arrays] = []
    for _, costs in in_turn(team, range(len(metrics)), ask):
        found.append(costs.result())
        advance()
    forget(team, _STAGE, WALK)
    means = {}
    for name, owners in text.owners.items():
        num_tokens = np.bincount(owners[owners >= 0], minlength=len(text.orders[name]))
        sums = np.stack([layer[name] for layer in found], axis=1)
        means[f"left_out.{name}"] = sums / np.maximum(1, num_tokens)[:, None, None]
    return means


@torch.inference_mode()
def _layer_costs(worker: Worker, shared: Shared[_Text], metric: Shared[torch.Tensor], layer: int) -> Arrays:
    """Sums over a place's tokens: assignment name -> (clusters, counts)."""
    loaded, text = worker.loaded, shared.value()
    costs, owners = metric.value().to(loaded.device), text.owners
    walk = walk_of(worker, text.key, text.documents, layer)
    while walk.layer < layer:
        walk.pass_on()
    sums = {name: np.zeros((len(orders), len(text.counts))) for name, orders in text.orders.items()}
    mixture = loaded.mixture(layer)
    for batch in walk.batches:
        entering, full = _mixed(loaded, layer, batch)
        for name, orders in text.orders.items():
            own = owners[name][batch.rows.cpu()]
            for cluster in np.unique(own[own >= 0]).tolist():
                rows = torch.from_numpy((own == cluster).nonzero()[0]).to(entering.device)
                kept = [orders[cluster, layer, :count].tolist() for count in text.counts]
                lost = [_lost(mixture, experts, entering[rows], full[rows], costs) for experts in kept]
                sums[name][cluster] += lost
    walk.layer += 1
    return sums


def _mixed(loaded: LoadedModel, layer: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch through a layer: what enters its mixture, and what that puts out, (tokens, hidden size) both."""
    seen: list[torch.Tensor] = []

    def look(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        seen.extend((inputs[0], _output_of(output)))

    hook = loaded.mixture(layer).register_forward_hook(look)
    try:
        batch.hidden = layer_output(loaded, layer, batch, batch.hidden)
    finally:
        hook.remove()
    entering, full = (pick(values.reshape(-1, values.shape[-1]), batch.mask) for values in seen)
    return entering, full


def _output_of(output: Any) -> torch.Tensor:
    # Some families' mixtures return the router's weights too.
    values: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return values


def _lost(
    mixture: Mixture, experts: Sequence[int], entering: torch.Tensor, full: torch.Tensor, metric: torch.Tensor
) -> float:
    """What errors cost where only some experts are there, summed over tokens."""
    with _only(mixture, experts):
        error = (_output_of(mixture.forward(entering)) - full).float()
    return 0.5 * float(((error @ metric) * error).sum(dtype=torch.float64))


@contextmanager
def _only(mixture: Mixture, experts: Sequence[int]) -> Iterator[None]:
    """Have the router choose among some experts for the time of the block."""
    every = mixture.tensors
    prefixes = tuple(f"experts.{number}." for number in experts)
    mixture.assign({role: tensor for role, tensor in every.items() if role.startswith(prefixes)})
    try:
        yield
    finally:
        mixture.assign(every)
