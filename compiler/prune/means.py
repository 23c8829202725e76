"""Moments of the tokens that a layer's FFN sees, cluster by cluster: each place sums its own, and sums are added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from coreinfer.compiler.team.adding import add_up, pass_on
from coreinfer.compiler.team.team import Pending, Team, Worker

from .dealt import Find, LayerTokens, TokenCounts
from .products import add_products, mirror

__all__ = ["Moments", "ask_moments", "ask_overall", "mean_moments", "weighted_sum"]

_TOKEN_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means over tokens of h h^T, h y^T, h and y; the last two only where the down projection has a bias."""

    gram: torch.Tensor
    cross: torch.Tensor
    mean_activation: torch.Tensor
    mean_target: torch.Tensor

    def parts(self) -> tuple[torch.Tensor, ...]:
        """All of them."""
        return self.gram, self.cross, self.mean_activation, self.mean_target


def ask_moments(
    team: Team, stage: str, finds: Mapping[int, Find], counts: TokenCounts, cluster: int, *, centred: bool
) -> Pending[Moments]:
    """Ask for one cluster's moments, from the places that have text of it.

    Args:
        centred: whether means of h and y are wanted too.
    """
    total = sum(counts[cluster].values())
    parts = {
        place: team.call(place, stage, _cluster_moments, finds[place], cluster, total, centred)
        for place in counts[cluster]
    }
    return add_up(team, stage, _add_moments, parts)


def ask_overall(
    team: Team,
    stage: str,
    finds: Mapping[int, Find],
    counts: TokenCounts,
    known: Mapping[int, Pending[Moments]] | None,
    homes: Mapping[int, int],
    *,
    centred: bool,
) -> Mapping[int, Pending[Moments]] | None:
    """Ask for the moments of all text; None where there is one cluster.

    Args:
        known: each cluster's moments, from which they follow; None to sum them over the tokens.
        homes: cluster -> place that works on it.
    Returns:
        Place -> the moments there.
    """
    if len(counts) == 1:
        return None
    totals = [sum(places.values()) for places in counts]
    all_tokens = sum(totals)
    parts: dict[int, Pending[Moments]] = {}
    if known is None:
        for place in sorted({place for places in counts for place in places}):
            parts[place] = team.call(place, stage, _place_moments, finds[place], all_tokens, centred)
    else:
        at_home: dict[int, list[int]] = {}
        for cluster in range(len(counts)):
            at_home.setdefault(homes[cluster], []).append(cluster)
        for place, clusters in sorted(at_home.items()):
            weights = [totals[cluster] / all_tokens for cluster in clusters]
            parts[place] = team.call(place, stage, _weigh, weights, *(known[cluster] for cluster in clusters))
    total = add_up(team, stage, _add_moments, parts)
    return pass_on(team, stage, total, sorted({*homes.values()}))


@torch.inference_mode()
def _cluster_moments(worker: Worker, find: Find, cluster: int, total: int, centred: bool) -> Moments:
    """A place's part of a cluster's moments; `total` tokens are the cluster's at all places."""
    seen = find(worker)
    return mean_moments(seen.tokens, seen.rows.calibration[cluster], total, centred=centred)


@torch.inference_mode()
def _place_moments(worker: Worker, find: Find, total: int, centred: bool) -> Moments:
    """A place's part of the moments of all text."""
    seen = find(worker)
    return mean_moments(seen.tokens, torch.cat([*seen.rows.calibration]), total, centred=centred)


@torch.inference_mode()
def _weigh(_worker: Worker, weights: Sequence[float], *moments: Moments) -> Moments:
    return weighted_sum(moments, weights)


@torch.inference_mode()
def _add_moments(_worker: Worker, first: Moments, second: Moments) -> Moments:
    gram, cross, activation, target = (a + b for a, b in zip(first.parts(), second.parts(), strict=True))
    return Moments(gram=gram, cross=cross, mean_activation=activation, mean_target=target)


def weighted_sum(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Mix moments."""
    columns = zip(*(item.parts() for item in moments), strict=True)
    sums = [
        torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(dim=0)
        if parts[0].ndim == 1
        else _accumulate(parts, weights)
        for parts in columns
    ]
    return Moments(gram=sums[0], cross=sums[1], mean_activation=sums[2], mean_target=sums[3])


def _accumulate(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total.add_(part, alpha=weight)
    return total


def mean_moments(tokens: LayerTokens, rows: torch.Tensor, total: int, *, centred: bool) -> Moments:
    """Sums over some tokens divided by the number of all; means are left at 0 where nothing is centred."""
    ffn_dim, hidden_size = tokens.activations.shape[1], tokens.targets.shape[1]
    device = tokens.activations.device
    sums = Moments(
        gram=torch.zeros((ffn_dim, ffn_dim), device=device),
        cross=torch.zeros((ffn_dim, hidden_size), device=device),
        mean_activation=torch.zeros(ffn_dim, device=device),
        mean_target=torch.zeros(hidden_size, device=device),
    )
    add_products(sums.gram, sums.cross, tokens.activations, tokens.targets, rows)
    mirror(sums.gram)
    if centred:
        for part in rows.split(_TOKEN_CHUNK):
            sums.mean_activation.add_(tokens.activations[part].float().sum(dim=0))
            sums.mean_target.add_(tokens.targets[part].float().sum(dim=0))
    for value in sums.parts():
        value.div_(max(1, total))
    return sums
